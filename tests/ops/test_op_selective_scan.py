"""Selective scan backends against the solution of the recurrence in closed form, in float64."""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from hymba_train.errors import UserError
from hymba_train.ops import selective_scan as plain
from hymba_train.ops.registry import BACKENDS as REGISTERED
from hymba_train.ops.registry import select
from tests.ops.emulator import emulated_backend, needs_emulator

TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not (TRITON and (INTERPRET or torch.cuda.is_available())),
    reason="needs triton, and a CUDA device or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(REGISTERED["selective_scan"][0].obstacles("cuda", (), torch.float32)),
    reason="needs a CUDA device and cuda-bindings",
)


def triton_backend(*args, **kwargs):
    from hymba_train.ops.selective_scan_triton import selective_scan_triton

    return selective_scan_triton(*args, **kwargs)


def cuda_backend(*args, **kwargs):
    from hymba_train.ops.selective_scan_cuda import selective_scan_cuda

    return selective_scan_cuda(*args, **kwargs)


BACKENDS = [
    pytest.param(plain.selective_scan, torch.float64, "cpu", 1e-10, id="torch"),
    pytest.param(plain.selective_scan, torch.float32, "cpu", 1e-5, id="torch-float32"),
    pytest.param(plain.selective_scan_reference, torch.float64, "cpu", 1e-10, id="reference"),
    pytest.param(triton_backend, torch.float32, DEVICE, 1e-5, id="triton", marks=needs_triton),
    pytest.param(cuda_backend, torch.float32, "cuda", 1e-5, id="cuda", marks=[pytest.mark.gpu, needs_cuda]),
    pytest.param(emulated_backend, torch.float32, "cpu", 1e-5, id="cuda-emulated", marks=needs_emulator),
]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(plain, "CHUNK_TOKENS", 4)
    if TRITON:
        from hymba_train.ops import selective_scan_triton

        monkeypatch.setattr(selective_scan_triton, "CHUNK_TOKENS", 8)


over_backends = pytest.mark.parametrize(("backend", "dtype", "device", "tolerance"), BACKENDS)


def inputs(B=2, S=11, C=5, N=4, state="shared", seed=0):
    """u, dt, A_log, B, C, D, dt_bias, z and the initial state; time steps from 1e-3 up to several."""
    generator = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A_log = torch.arange(1.0, N + 1, dtype=torch.float64).log() + 0.2 * r(C, N)
    bias = torch.linspace(-6.9, 1.0, C, dtype=torch.float64)
    tensors = [r(B, S, C), r(B, S, C), A_log, r(B, S, N), r(B, S, N), r(C), bias, r(B, S, C)]
    tensors.append({"shared": lambda: r(C, N), "rows": lambda: r(B, C, N), "none": lambda: None}[state]())
    return [x if x is None else x.requires_grad_() for x in tensors]


def formula(u, dt, A_log, B, C, D, dt_bias, z, *, initial_state=None, segment_ids=None):
    """h_t = exp(A s_t) h0 + sum_j exp(A (s_t - s_j)) delta_j B_j u_j over the document, s the running sum of delta."""
    batch, num_tokens, _ = u.shape
    ids = torch.zeros(batch, num_tokens, dtype=torch.int64) if segment_ids is None else segment_ids
    A, delta = -A_log.exp(), F.softplus(dt + dt_bias)
    h0 = torch.zeros(batch, *A.shape, dtype=u.dtype) if initial_state is None else initial_state.expand(batch, *A.shape)
    rows, finals = [], []
    for b in range(batch):
        y, h = [], h0[b]
        for t in range(num_tokens):
            first = int((ids[b] == ids[b, t]).nonzero()[0])
            steps = delta[b, first : t + 1]
            remaining = steps.flip(0).cumsum(0).flip(0) - steps  # sum of delta after step j, up to t
            decay = torch.exp(remaining[:, :, None] * A)
            source = (steps * u[b, first : t + 1])[:, :, None] * B[b, first : t + 1, None, :]
            h = torch.exp(steps.sum(0)[:, None] * A) * h0[b] + (decay * source).sum(0)
            y.append((h @ C[b, t] + D * u[b, t]) * F.silu(z[b, t]))
        rows.append(torch.stack(y) if y else u[b])
        finals.append(h)
    return torch.stack(rows), torch.stack(finals)


def outputs_and_gradients(function, tensors, segment_ids=None, dtype=torch.float64, device="cpu"):
    tensors = [x if x is None else x.detach().to(device, dtype).requires_grad_() for x in tensors]
    ids = None if segment_ids is None else segment_ids.to(device)
    results = function(*tensors[:8], initial_state=tensors[8], segment_ids=ids)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    given = [x for x in tensors if x is not None]
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    gradients = torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)
    return [x.double().cpu() for x in (*results, *gradients)]


def assert_close(found, expected, tolerance):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert not a.numel() or (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), index


@over_backends
@pytest.mark.parametrize("state", ["shared", "rows", "none"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_equals_closed_form(backend, dtype, device, tolerance, state, packed):
    tensors = inputs(state=state)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 3, 4, 4, 4, 4], [2, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6]]) if packed else None
    expected = outputs_and_gradients(formula, tensors, ids)
    found = outputs_and_gradients(backend, tensors, ids, dtype, device)
    assert_close(found, expected, tolerance)


@over_backends
@pytest.mark.parametrize("S", [0, 1, 4, 63, 64, 65, 140])
def test_lengths_around_chunk_borders(backend, dtype, device, tolerance, S):
    if INTERPRET and backend is triton_backend and S > 65:
        pytest.skip("too slow in Triton's interpreter")
    tensors = inputs(B=1, S=S, C=3, N=2)
    expected = outputs_and_gradients(formula, tensors)
    assert_close(outputs_and_gradients(backend, tensors, None, dtype, device), expected, 10 * tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 7, 30, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_torch_does_not_depend_on_the_chunk(chunk, packed, monkeypatch):
    tensors = inputs(S=30)
    ids = (
        torch.cumsum((torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.3).long(), 1)
        if packed
        else None
    )
    expected = outputs_and_gradients(plain.selective_scan_reference, tensors, ids)
    monkeypatch.setattr(plain, "CHUNK_TOKENS", chunk)
    assert_close(outputs_and_gradients(plain.selective_scan, tensors, ids), expected, 1e-10)


def test_torch_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(plain, "CHUNK_TOKENS", 2)
    tensors = inputs(B=2, S=5, C=2, N=2, state="rows")
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])

    def scan(*args):
        return plain.selective_scan(*args[:8], initial_state=args[8], segment_ids=ids)

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=False)


@over_backends
@pytest.mark.usefixtures("small_chunks")
def test_packed_documents_equal_documents_alone(backend, dtype, device, tolerance):
    lengths = [1, 20, 2, 17]
    tensors = inputs(B=1, S=sum(lengths))
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]

    def alone(u, dt, A_log, B, C, D, dt_bias, z, *, initial_state, segment_ids):
        cut = zip(*(x.split(lengths, 1) for x in (u, dt, B, C, z)), strict=True)
        parts = [formula(a, b, A_log, c, d, D, dt_bias, e, initial_state=initial_state) for a, b, c, d, e in cut]
        return torch.cat([y for y, _ in parts], 1), parts[-1][1]

    expected = outputs_and_gradients(alone, tensors)
    assert_close(outputs_and_gradients(backend, tensors, ids, dtype, device), expected, tolerance)


@over_backends
def test_prefix_computed_once_equals_concatenated_rows(backend, dtype, device, tolerance):
    """State after one copy of the prefix, handed to every row, with gradients back into the prefix."""
    M, S, rows = 7, 9, 3
    text, meta = inputs(B=rows, S=S, state="none"), inputs(B=1, S=M, state="none", seed=1)
    leaves = [
        x.detach() for x in (text[0], text[1], text[3], text[4], text[7], meta[0], meta[1], meta[3], meta[4], meta[7])
    ]
    shared = [text[2].detach(), text[5].detach(), text[6].detach()]

    def run(function, split, dtype, device):
        u, dt, B, C, z, mu, mdt, mB, mC, mz = own = [x.to(device, dtype).requires_grad_() for x in leaves]
        A_log, D, bias = weights = [x.to(device, dtype).requires_grad_() for x in shared]
        if split:
            my, state = function(mu, mdt, A_log, mB, mC, D, bias, mz)
            y, _ = function(u, dt, A_log, B, C, D, bias, z, initial_state=state[0])
            my = my.expand(rows, -1, -1)
        else:
            pairs = ((mu, u), (mdt, dt), (mB, B), (mC, C), (mz, z))
            u, dt, B, C, z = (torch.cat((m.expand(rows, -1, -1), t), 1) for m, t in pairs)
            y, _ = function(u, dt, A_log, B, C, D, bias, z)
            my, y = y[:, :M], y[:, M:]
        weight = torch.randn(rows, M + S, y.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        loss = (torch.cat((my, y), 1) * weight.to(y)).sum()
        return [x.double().cpu() for x in (my[0], y, *torch.autograd.grad(loss, [*own, *weights]))]

    assert_close(run(backend, True, dtype, device), run(formula, False, torch.float64, "cpu"), 10 * tolerance)


@over_backends
def test_bf16_activations(backend, dtype, device, tolerance):
    """y in bf16, the state and everything inside in float32."""
    tensors = inputs(B=1, S=20)
    low = [x.detach().bfloat16() for x in tensors]
    expected, expected_state = formula(*(x.double() for x in low[:8]), initial_state=low[8].double())
    args = [x.to(device) for x in low]
    for position in (2, 5, 6):  # A_log, D and the bias are float32 in a bf16 model
        args[position] = args[position].float()
    y, state = backend(*args[:8], initial_state=args[8].float())
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_close([y.double().cpu()], [expected.detach()], 1e-2)
    assert_close([state.double().cpu()], [expected_state.detach()], 1e-5)


def test_torch_keeps_only_states_at_chunk_borders():
    B, S, C, N = 2, 256, 16, 16
    tensors = inputs(B=B, S=S, C=C, N=N)
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        plain.selective_scan(*tensors[:8], initial_state=tensors[8])
    assert sum(kept.values()) < B * S * C * N / 1.5


@pytest.mark.parametrize("op", [plain.selective_scan, plain.selective_scan_reference])
def test_small_time_steps_keep_their_digits(op):
    """float32, and delta of 1e-3 as at the start of training."""
    tensors = inputs(B=1, S=64, C=4)
    tensors[6] = torch.full_like(tensors[6], -6.9).detach()
    tensors[1] = 0.01 * tensors[1].detach()
    expected, _ = formula(*tensors[:8], initial_state=tensors[8])
    low = [x.detach().float() for x in tensors]
    assert_close([op(*low[:8], initial_state=low[8])[0].double()], [expected], 1e-6)


@needs_triton
@pytest.mark.parametrize("packed", [False, True])
def test_triton_is_deterministic_and_takes_odd_channel_numbers(packed):
    tensors = inputs(B=2, S=13, C=37, N=4)
    ids = torch.tensor([[0] * 6 + [1] * 7, [0] * 13]) if packed else None
    expected = outputs_and_gradients(formula, tensors, ids)
    first, second = (outputs_and_gradients(triton_backend, tensors, ids, torch.float32, DEVICE) for _ in range(2))
    assert_close(first, expected, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_triton_names_the_backend_that_can():
    tensors = inputs(N=3)
    with pytest.raises(UserError, match=r"power of two.*not 3; use 'torch'"):
        triton_backend(*(x.float() for x in tensors[:8]))


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
def test_triton_at_model_sizes(packed):
    tensors = inputs(B=2, S=2048, C=3200, N=16)
    ids = torch.cumsum((torch.rand(2, 2048, generator=torch.Generator().manual_seed(1)) < 0.003).long(), 1)
    ids = ids if packed else None
    expected = outputs_and_gradients(plain.selective_scan, tensors, ids, torch.float32, "cuda")
    scan = select("selective_scan", "triton", "cuda", needs={"segment_ids", "state_grad"})
    assert_close(outputs_and_gradients(scan, tensors, ids, torch.float32, "cuda"), expected, 1e-4)
