"""What the tests of the fused Triton ops share: where they can run, and the comparison with float64."""

import importlib.util
import os

import pytest
import torch

TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not (TRITON and (INTERPRET or torch.cuda.is_available())),
    reason="needs triton, and a CUDA device or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
"""Of the norm of the difference over that of the float64 result."""
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bf16")]


def random(*shape, seed=0):
    """Standard normal, float64, different for every shape and seed."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def outputs_and_gradients(function, tensors, dtype, device, keep=()):
    """function(*tensors)'s outputs and the gradients of all tensors, as float64 on the CPU.

    Tensors go there in ``dtype`` (those whose position is in ``keep``: float32, or float64 with it).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(device, wide if i in keep else dtype).detach().requires_grad_() for i, x in enumerate(tensors)]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o * random(*o.shape, seed=9).to(o.device, o.dtype)).sum() for o in out if o.numel())
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach().double().cpu() for x in (*out, *gradients)]


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, index
        error = (a - b).norm() / b.norm().clamp(min=1e-3)
        assert error <= tolerance, (index, float(error))  # NaN fails


def check(fused, plain, tensors, dtype, keep=()):
    """``fused`` in dtype against ``plain`` in float64 on the same (rounded) numbers: outputs and every gradient."""
    rounded = [x.to(torch.float32 if i in keep else dtype).double() for i, x in enumerate(tensors)]
    expected = outputs_and_gradients(plain, rounded, torch.float64, "cpu")
    assert_close(outputs_and_gradients(fused, rounded, dtype, DEVICE, keep), expected, TOLERANCE[dtype])
