"""Scan of Mamba-2: chunked and step by step against the closed form, in float64, with gradients."""

import pytest
import torch
import torch.nn.functional as F

from hymba_train.ops import ssd_scan as plain
from hymba_train.ops.registry import BACKENDS, select

BACKEND = {"torch": plain.ssd_scan, "reference": plain.ssd_scan_reference}
over_backends = pytest.mark.parametrize("backend", BACKEND.values(), ids=BACKEND)
PACKED = torch.tensor([[0, 0, 0, 0, 1, 1, 3, 4, 4, 4, 4], [2, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6]])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(plain, "CHUNK_TOKENS", 4)


def inputs(B=2, S=11, H=4, P=3, G=2, N=5, state="shared", seed=0):
    """x, dt, A_log, B, C, D, dt_bias and the initial state."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = [r(B, S, H, P), r(B, S, H), torch.linspace(0, 2.7, H).double(), r(B, S, G, N), r(B, S, G, N), r(H)]
    tensors.append(torch.linspace(-6.9, 1.0, H, dtype=torch.float64))
    tensors.append({"shared": lambda: r(H, P, N), "rows": lambda: r(B, H, P, N), "none": lambda: None}[state]())
    return tensors


def formula(x, dt, A_log, B, C, D, dt_bias, *, initial_state=None, segment_ids=None):
    """h_t = exp(A s_t) h0 + sum_j exp(A (s_t - s_j)) delta_j x_j B_j^T over the document; s: running sum of delta."""
    batch, num_tokens, heads, width = x.shape
    ids = torch.zeros(batch, num_tokens, dtype=torch.int64) if segment_ids is None else segment_ids
    delta, A = F.softplus(dt + dt_bias), -A_log.exp()
    group = torch.arange(heads) * B.shape[2] // heads
    rows, finals = [], []
    for b in range(batch):
        h0 = torch.zeros(heads, width, B.shape[3], dtype=x.dtype)
        if initial_state is not None:
            h0 = initial_state[b] if initial_state.dim() == 4 else initial_state
        y, h = [], h0
        for t in range(num_tokens):
            first = int((ids[b] == ids[b, t]).nonzero()[0])
            steps = delta[b, first : t + 1]  # [T, H]
            remaining = steps.flip(0).cumsum(0).flip(0) - steps
            decay = torch.exp(remaining * A) * steps
            source = torch.einsum("th,thp,thn->hpn", decay, x[b, first : t + 1], B[b, first : t + 1][:, group])
            h = torch.exp(steps.sum(0) * A)[:, None, None] * h0 + source
            y.append((h * C[b, t, group][:, None]).sum(-1) + D[:, None] * x[b, t])
        rows.append(torch.stack(y) if y else x[b])
        finals.append(h)
    return torch.stack(rows), torch.stack(finals)


def outputs_and_gradients(function, tensors, segment_ids=None, dtype=torch.float64):
    tensors = [x if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    results = function(*tensors[:7], initial_state=tensors[7], segment_ids=segment_ids)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r) for r in results]
    given = [x for x in tensors if x is not None]
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    gradients = torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)
    return [x.double() for x in (*results, *gradients)]


def assert_close(found, expected, tolerance=1e-10):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert not a.numel() or (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), index


@over_backends
@pytest.mark.parametrize("state", ["shared", "rows", "none"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_equals_closed_form(backend, state, packed):
    tensors, ids = inputs(state=state), PACKED if packed else None
    expected = outputs_and_gradients(formula, tensors, ids)
    assert_close(outputs_and_gradients(backend, tensors, ids), expected)


@over_backends
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.usefixtures("small_chunks")
def test_groups(backend, groups):
    tensors = inputs(G=groups)
    expected = outputs_and_gradients(formula, tensors, PACKED)
    assert_close(outputs_and_gradients(backend, tensors, PACKED), expected)


@pytest.mark.parametrize("S", [0, 1, 63, 64, 65, 140])
def test_lengths_around_chunk_borders(S):
    tensors = inputs(B=1, S=S)
    expected = outputs_and_gradients(plain.ssd_scan_reference, tensors)
    assert_close(outputs_and_gradients(plain.ssd_scan, tensors), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_float32_does_not_lose_late_documents(packed):
    """A document that begins after much decay: sums that run over the whole row would be too coarse there."""
    tensors = inputs(B=1, S=600, G=1)
    ids = torch.arange(600).div(37, rounding_mode="floor").unsqueeze(0) if packed else None
    expected = outputs_and_gradients(plain.ssd_scan_reference, tensors, ids)
    assert_close(outputs_and_gradients(plain.ssd_scan, tensors, ids, torch.float32), expected, 2e-5)


@over_backends
@pytest.mark.usefixtures("small_chunks")
def test_documents_do_not_leak(backend):
    """A change in one document, to any input, changes nothing in those after it; nor does a later token before it."""
    tensors = inputs()
    y, _ = backend(*tensors[:7], initial_state=tensors[7], segment_ids=PACKED)
    for index in (0, 1, 3, 4):
        other = [x.clone() for x in tensors]
        other[index][:, 2] += 1  # row 0: document 0, tokens 0..3; row 1: document 5, tokens 1..9
        changed, _ = backend(*other[:7], initial_state=other[7], segment_ids=PACKED)
        same = (changed == y).all(-1).all(-1)
        assert same[0, 4:].all() and same[1, 10:].all() and same[:, :2].all()
        assert not same[:, 2].any()


def test_only_the_inputs_are_kept():
    tensors = [x.requires_grad_() for x in inputs(S=200)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        plain.ssd_scan(*tensors[:7], initial_state=tensors[7])
    known = {t.untyped_storage().data_ptr() for t in tensors}
    assert kept and {t.untyped_storage().data_ptr() for t in kept} <= known


def test_backends_and_where_they_run():
    assert [b.name for b in BACKENDS["ssd_scan"]] == ["mamba_ssm", "torch", "reference"]
    needs = {"backward", "segment_ids", "initial_state", "state_grad", "deterministic"}
    assert select("ssd_scan", "auto", "cpu", needs=needs, dtype=torch.float32).name == "torch"
