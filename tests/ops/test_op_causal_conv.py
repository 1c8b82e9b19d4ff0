"""Causal convolution against its sum written out, in float64."""

import pytest
import torch
import torch.nn.functional as F

from hymba_train.ops.causal_conv import causal_conv


def inputs(B=2, S=9, C=3, K=4, taps="shared"):
    generator = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    initial = {"shared": lambda: r(K - 1, C), "rows": lambda: r(B, K - 1, C), "none": lambda: None}[taps]()
    return [r(B, S, C), r(C, K), r(C), initial]


def formula(x, weight, bias, *, initial_taps=None, segment_ids=None):
    """Every document by itself: its taps in front of it, then the sum."""
    B, S, C = x.shape
    K = weight.shape[1]
    taps = torch.zeros(B, K - 1, C, dtype=x.dtype) if initial_taps is None else initial_taps.expand(B, K - 1, C)
    rows, finals = [], []
    for b in range(B):
        ids = [0] * S if segment_ids is None else segment_ids[b].tolist()
        y, history = [], taps[b]
        for t in range(S):
            if t == 0 or ids[t] != ids[t - 1]:
                history = taps[b]
            history = torch.cat((history, x[b, t : t + 1]))
            y.append(F.silu((history[-K:] * weight.t()).sum(0) + bias))
        rows.append(torch.stack(y) if y else x[b])
        finals.append(history[history.shape[0] - (K - 1) :])
    return torch.stack(rows), torch.stack(finals)


def outputs_and_gradients(function, tensors, **kwargs):
    results = function(*tensors[:3], initial_taps=tensors[3], **kwargs)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    given = [x for x in tensors if x is not None]
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)]


PACKED = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 5, 5], [3, 3, 4, 4, 4, 4, 4, 4, 4]])


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("taps", ["shared", "rows", "none"])
@pytest.mark.parametrize("segment_ids", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("S", [0, 1, 2, 9])
def test_equals_formula(K, taps, segment_ids, S):
    tensors = inputs(S=S, K=K, taps=taps)
    ids = None if segment_ids is None else segment_ids[:, :S]
    expected = outputs_and_gradients(formula, tensors, segment_ids=ids)
    found = outputs_and_gradients(causal_conv, tensors, segment_ids=ids)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_equals_conv1d():
    """Orientation of the taps, held to torch's own convolution as the published code calls it."""
    x, weight, bias, _ = inputs(taps="none")
    padded = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=3)
    torch.testing.assert_close(causal_conv(x, weight, bias)[0], F.silu(padded[..., : x.shape[1]]).transpose(1, 2))


def test_prefix_computed_once_equals_concatenated_rows():
    x, weight, bias, _ = inputs(B=3, taps="none")
    meta = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    meta_out, taps = causal_conv(meta, weight, bias)
    out, final = causal_conv(x, weight, bias, initial_taps=taps[0])
    joined, joined_final = formula(torch.cat((meta.expand(3, -1, -1), x), 1), weight, bias)
    split = torch.cat((meta_out.expand(3, -1, -1), out), 1)
    torch.testing.assert_close(split, joined)
    torch.testing.assert_close(final, joined_final)
    weights = torch.randn(split.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for a, b in zip(*(torch.autograd.grad(y, (meta, x, weight, bias), weights) for y in (split, joined)), strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_sums_in_float32():
    x, weight, bias, taps = (t.detach().bfloat16() for t in inputs(S=40, C=8))
    found, final = causal_conv(x, weight, bias, initial_taps=taps)
    expected, _ = formula(x.double(), weight.double(), bias.double(), initial_taps=taps.double())
    assert found.dtype == final.dtype == torch.bfloat16
    assert torch.equal(found, expected.float().bfloat16())
