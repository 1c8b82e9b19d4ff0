"""Output layer and cross-entropy: the plain one against its formula, the Triton one against that, in float64."""

import pytest
import torch

from hymba_train.ops.cross_entropy import linear_cross_entropy
from tests.ops.fused import DEVICE, DTYPES, check, needs_triton, random

N, D, V, PADDED = 7, 12, 21, 32


def labels(n=N, v=V):
    found = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(3))
    found[1::3] = -100
    return found


def tensors(n=N, v=PADDED):
    return [random(n, D), random(v, D)]


def fused(hidden, weight, lab, vocab_size):
    from hymba_train.ops.cross_entropy_triton import linear_cross_entropy_triton

    return linear_cross_entropy_triton(hidden, weight, lab.to(hidden.device), vocab_size)


def test_plain_equals_formula():
    hidden, weight = tensors()
    logits = hidden @ weight[:V].t()
    expected = [0.0 if i < 0 else float(logits[r].logsumexp(0) - logits[r, i]) for r, i in enumerate(labels())]
    found = linear_cross_entropy(hidden, weight, labels(), V)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_plain_in_bf16_is_float32_and_leaves_padding_alone():
    hidden, weight = (t.bfloat16().requires_grad_() for t in tensors())
    loss = linear_cross_entropy(hidden, weight, labels(), V)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert not weight.grad[V:].any()
    assert weight.grad[:V].any()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [V, PADDED])
def test_triton_equals_plain(dtype, v, monkeypatch):
    from hymba_train.ops import cross_entropy_triton as module

    monkeypatch.setattr(module, "FORWARD_BLOCK", 16)
    monkeypatch.setattr(module, "BACKWARD_BLOCK", 16)
    check(
        lambda *t: fused(*t, labels(v=v), v),
        lambda *t: linear_cross_entropy(*t, labels(v=v), v), tensors(), dtype,
    )  # fmt: skip


@needs_triton
def test_nothing_to_predict():
    hidden, weight = (t.float().to(DEVICE).requires_grad_() for t in (random(0, D), random(PADDED, D)))
    fused(hidden, weight, labels(0), V).sum().backward()
    assert hidden.grad.shape == (0, D) and not weight.grad.any()


@needs_triton
def test_large_logits_do_not_overflow():
    scaled = [100 * t for t in tensors()]
    check(lambda *t: fused(*t, labels(), V), lambda *t: linear_cross_entropy(*t, labels(), V), scaled, torch.float32)


@needs_triton
def test_a_second_backward_is_refused():
    hidden, weight = (t.float().to(DEVICE).requires_grad_() for t in tensors())
    loss = fused(hidden, weight, labels(), V).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="became their gradient"):
        loss.backward()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_weight_gradient_is_added_to_main_grad(dtype, tied):
    hidden, weight = (t.to(DEVICE, dtype).requires_grad_() for t in tensors())
    linear_cross_entropy(hidden.double(), weight.double(), labels().to(DEVICE), V).sum().backward()
    expected, weight.grad = weight.grad.double(), None
    weight.main_grad = torch.ones(weight.shape, device=DEVICE)
    weight.zero_out_wgrad, weight.grad_added_to_main_grad = tied, False
    fused(hidden, weight, labels(), V).sum().backward()
    error = (weight.main_grad - 1 - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert weight.grad_added_to_main_grad is not tied
    assert (weight.grad is None) is tied


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_rows_than_a_grid_axis_holds():
    """CUDA's second and third grid axes end at 65,535."""
    n = 65_600
    hidden, weight, lab = torch.randn(n, 16, device="cuda"), torch.randn(128, 16, device="cuda"), labels(n, 100).cuda()
    hidden.requires_grad_()
    wide = hidden.detach().double().requires_grad_()
    torch.autograd.backward(linear_cross_entropy(wide, weight.double(), lab, 100).sum())
    torch.autograd.backward(fused(hidden, weight, lab, 100).sum())
    assert (hidden.grad.double() - wide.grad).norm() <= 1e-2 * wide.grad.norm()  # the products may be TF32
