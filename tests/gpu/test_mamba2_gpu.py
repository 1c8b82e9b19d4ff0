"""Mamba-2 by the kernels of mamba_ssm, on a GPU: values, gradients, documents apart, what is kept."""

import importlib.util

import pytest
import torch

from hymba_train.ops.registry import BACKENDS, select
from hymba_train.ops.ssd_scan import ssd_scan, ssd_scan_reference
from tests.describe.test_saved_activations import BF16, BIG, case, compare, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs the package mamba_ssm"),
]
NAMES = ("y", "final state", "x", "dt", "A_log", "B", "C", "D", "dt_bias", "initial state")


def inputs(B=2, S=700, H=4, P=64, G=1, N=128):
    """As a model has them: small time steps, values of bf16; A_log, D, dt_bias and the state in float32."""
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(shape, generator=g).bfloat16().double()

    heads = [torch.linspace(0, 2.7, H).double(), r(H), torch.linspace(-6.9, -2.25, H).double()]
    return [r(B, S, H, P), r(B, S, H), heads[0], r(B, S, G, N), r(B, S, G, N), *heads[1:], r(H, P, N)]


def segments():
    ids = torch.zeros(2, 700, dtype=torch.int64)
    ids[0, 100:] += 1
    ids[0, 101:] += 1
    ids[0, 511:] += 1
    ids[1, 256:] += 1
    return ids.cuda()


def results(function, tensors, ids, low):
    """Outputs and gradients in float64, on the CPU. ``low``: activations in bf16, the rest in float32."""
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16] + [torch.float32] * 3
    given = [t.cuda().to(d if low else torch.float64).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]
    outputs = function(*given[:7], initial_state=given[7], segment_ids=ids)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=g).to(o) for o in outputs]
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return [t.double().cpu() for t in (*outputs, *torch.autograd.grad(total, given))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_rounding_alone_separates_it_from_the_reference(packed, groups):
    """Its error against float64 is that of the torch backend on the same bf16 values, within a factor."""
    tensors, ids = inputs(G=groups), segments() if packed else None
    exact = results(ssd_scan_reference, tensors, ids, low=False)
    kernels = select("ssd_scan", "mamba_ssm", "cuda", needs={"backward", "segment_ids"}, dtype=torch.bfloat16)
    plain, fast = (results(f, tensors, ids, low=True) for f in (ssd_scan, kernels))
    for name, e, p, f in zip(NAMES, exact, plain, fast, strict=True):
        size = e.norm()
        assert (f - e).norm() <= 4 * (p - e).norm() + 2**-7 * size, (name, (f - e).norm() / size, (p - e).norm() / size)


def test_documents_do_not_leak():
    kernels = BACKENDS["ssd_scan"][0].function
    tensors = [t.cuda().bfloat16() if i in (0, 1, 3, 4) else t.cuda().float() for i, t in enumerate(inputs())]
    y, _ = kernels(*tensors[:7], initial_state=tensors[7], segment_ids=segments())
    for index in (0, 1, 3, 4):
        other = [t.clone() for t in tensors]
        other[index][:, 90] += 1
        changed, _ = kernels(*other[:7], initial_state=other[7], segment_ids=segments())
        assert torch.equal(changed[:, :90], y[:, :90]) and not torch.equal(changed[:, 90:100], y[:, 90:100])
        # Decays come from sums of dt over a chunk, in which documents may begin: another dt rounds later ones anew.
        ulps = 2 if index == 1 else 0
        for row, start in ((0, 100), (1, 256)):
            torch.testing.assert_close(changed[row, start:], y[row, start:], rtol=ulps * 2**-7, atol=ulps * 2**-7)


@pytest.mark.parametrize("documents", [False, True])
def test_lists_hold_what_is_saved(documents):
    alone = ["model.num_layers=1", "model.kv_groups=[]", "model.global_layers=[]", "model.layer_pattern=[mamba2]"]
    one = case([*BIG, *BF16, *alone], 0, 1024, "cuda", documents)
    compare(one, measure({"one": one})["one"])
