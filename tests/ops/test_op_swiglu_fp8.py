"""SwiGLU that writes FP8, in Triton, against a cast of what it writes without; Transformer Engine's part is in
tests/gpu/test_swiglu_fp8_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

from hymba_train.ops import float8
from tests.ops.fused import DEVICE, INTERPRET, needs_triton, random

pytestmark = needs_triton
WRONG = 0.2 if INTERPRET else 0.0
"""Share of numbers that may differ: Triton's interpreter loses the carry where a cast rounds up to a power of two."""


@pytest.fixture(autouse=True)
def pairs(monkeypatch):
    """In place of Float8Tensors, which need Transformer Engine: the numbers they stand for."""
    monkeypatch.setattr(float8, "dtype_of", lambda quantizer: quantizer.dtype)
    monkeypatch.setattr(float8, "tensor", lambda data, inverse, q, dtype: (data.float() * inverse).to(dtype))


def quantizer(scale, dtype, amax=0.0):
    one = lambda value: torch.tensor([value], device=DEVICE)  # noqa: E731
    return SimpleNamespace(scale=one(scale), amax=one(amax), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 2), (5, 1, 90), (9, 2600)])
def test_fp8_is_the_cast_of_the_result_and_its_largest_value_is_noted(shape):
    from hymba_train.ops.swiglu_triton import swiglu_triton, swiglu_triton_fp8

    result, gradient = quantizer(12.5, torch.float8_e4m3fn), quantizer(0.75, torch.float8_e5m2)
    x = random(*shape).to(DEVICE, torch.bfloat16)
    found, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = swiglu_triton_fp8(found, result, gradient), swiglu_triton(plain)
    d_out = random(*expected.shape, seed=3).to(DEVICE, torch.bfloat16)
    out.backward(d_out)
    expected.backward(d_out)
    for value, wide, q in ((out, expected, result), (found.grad, plain.grad, gradient)):
        assert q.amax == wide.abs().max()
        cast = ((wide.float() * q.scale).to(q.dtype).float() * (1 / q.scale)).to(torch.bfloat16)
        assert (value != cast).float().mean() <= WRONG


def test_largest_value_is_that_of_all_micro_batches():
    from hymba_train.ops.swiglu_triton import swiglu_triton_fp8

    q = quantizer(1.0, torch.float8_e4m3fn, amax=1e4)
    swiglu_triton_fp8(torch.ones(3, 8, device=DEVICE, dtype=torch.bfloat16), q, q)
    assert q.amax == 1e4


def test_what_does_not_fit_becomes_the_largest_number_that_does():
    from hymba_train.ops.swiglu_triton import swiglu_triton_fp8

    if INTERPRET:
        pytest.skip("Triton's interpreter does not saturate")
    q = quantizer(1e3, torch.float8_e4m3fn)
    out = swiglu_triton_fp8(torch.full((3, 8), 9.0, device=DEVICE, dtype=torch.bfloat16), q, q)
    assert torch.equal(out.float(), torch.full_like(out, 0.448).float())
