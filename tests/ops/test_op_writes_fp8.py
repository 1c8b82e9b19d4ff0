"""Triton ops that write FP8, against a cast of what they write without; Transformer Engine's part is in
tests/gpu/test_writes_fp8_gpu.py."""

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
    numbers = lambda data, inverse, q, dtype: data if q is None else (data.float() * inverse).to(dtype)  # noqa: E731
    monkeypatch.setattr(float8, "tensor", numbers)


def quantizer(scale, dtype, amax=0.0):
    one = lambda value: torch.tensor([value], device=DEVICE)  # noqa: E731
    return SimpleNamespace(scale=one(scale), amax=one(amax), dtype=dtype)


def cast_of(wide, q):
    return ((wide.float() * q.scale).to(q.dtype).float() * (1 / q.scale)).to(torch.bfloat16)


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
        assert (value != cast_of(wide, q)).float().mean() <= WRONG


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_of_the_mean_of_two_norms(ranks):
    """ranks 2: sums of squares go through all_reduce, which doubles them."""
    from hymba_train.ops.normed_average_triton import normed_average_fp8, normed_average_triton

    width, q = 320, quantizer(12.5, torch.float8_e4m3fn)
    a, s = (random(7, 1, width, seed=seed).to(DEVICE, torch.bfloat16) for seed in (1, 2))
    weights = [random(width, seed=seed).to(DEVICE, torch.float32) for seed in (3, 4)]
    rest = (1e-6, ranks * width, (lambda t: t.mul_(2)) if ranks == 2 else None)
    wide = normed_average_triton(a, s, *weights, *rest)
    found = normed_average_fp8(a, s, *weights, *rest, q)
    assert found.shape == wide.shape and q.amax == wide.abs().max()
    assert (found != cast_of(wide, q)).float().mean() <= WRONG


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
