"""The CUDA selective scan: chunks of time, layouts and types; on a GPU, and its very source in a warp emulator."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.ops import gradient_slots, registry
from hymba_train.ops import selective_scan as plain
from hymba_train.ops import selective_scan_cuda as scan
from hymba_train.ops.gradient_slots import split_columns, split_rows, view_with_slot
from hymba_train.ops.registry import Choice, select
from hymba_train.ops.selective_scan_rows import selective_scan_rows
from tests.ops.emulator import emulated, emulated_backend, needs_emulator
from tests.ops.test_op_selective_scan import assert_close, cuda_backend, inputs, needs_cuda, outputs_and_gradients

BACKENDS = [
    pytest.param(emulated_backend, "cpu", id="emulated", marks=needs_emulator),
    pytest.param(cuda_backend, "cuda", id="cuda", marks=[pytest.mark.gpu, needs_cuda]),
]
over_devices = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def over_devices_and(names, cases, quick):
    """Every case on a GPU; in the emulator those of ``quick`` by default and the others as slow tests."""
    params = []
    for device in BACKENDS:
        for case in cases:
            slow = [pytest.mark.slow] if device.id == "emulated" and case not in quick else []
            params.append(pytest.param(*device.values, *case, marks=[*device.marks, *slow]))
    return pytest.mark.parametrize(("backend", "device", *names), params)


CHUNKS = [(80, 1, False), (32, 3, True), (16, 5, True), (32, 3, False), (16, 5, False)]


def documents(B, S, seed=1, often=0.1):
    return torch.cumsum((torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < often).long(), 1)


@over_devices_and(
    ("chunks", "packed", "state"),
    list(itertools.product(CHUNKS, [False, True], ["shared", "rows", "none"])),
    quick=[
        (CHUNKS[0], False, "none"),
        (CHUNKS[1], True, "shared"),
        (CHUNKS[3], False, "rows"),
        (CHUNKS[4], True, "rows"),
    ],
)
def test_does_not_depend_on_the_chunks(backend, device, chunks, packed, state, monkeypatch):
    """70 tokens and 67 channels: nothing is a multiple of anything."""
    monkeypatch.setattr(scan, "CHUNKS", scan.Chunks(*chunks))
    tensors = inputs(B=2, S=70, C=67, N=16, state=state)
    ids = documents(2, 70) if packed else None
    expected = outputs_and_gradients(plain.selective_scan_reference, tensors, ids)
    assert_close(outputs_and_gradients(backend, tensors, ids, torch.float32, device), expected, 1e-5)


@over_devices
@pytest.mark.parametrize("chunks", [(32, 2, True), (32, 2, False)])
def test_a_document_may_start_at_a_chunk_and_at_the_first_token(backend, device, chunks, monkeypatch):
    monkeypatch.setattr(scan, "CHUNKS", scan.Chunks(*chunks))
    tensors = inputs(B=2, S=50, C=5, N=16)
    ids = torch.zeros(2, 50, dtype=torch.int64)
    ids[:, 32:] = 1
    ids[1, 1:] += 1
    expected = outputs_and_gradients(plain.selective_scan_reference, tensors, ids)
    assert_close(outputs_and_gradients(backend, tensors, ids, torch.float32, device), expected, 1e-5)


@over_devices_and(
    ("x_dtype", "bc_dtype", "offset", "C"),
    [
        (x, bc, *place)
        for x in (torch.float32, torch.bfloat16)
        for bc in (torch.float32, torch.bfloat16)
        for place in ((4, 128), (1, 128), (4, 66))
    ],
    quick=[(torch.bfloat16, torch.float32, 4, 128), (torch.bfloat16, torch.bfloat16, 1, 128)],
)
def test_slices_of_wider_rows(backend, device, x_dtype, bc_dtype, offset, C):
    """u, dt, z, B, C and the gradient to y cut out of wider rows, at even and odd places."""
    B, S, N = 2, 33, 16
    tensors = [None if x is None else x.detach() for x in inputs(B=B, S=S, C=C, N=N)]
    low = {0: x_dtype, 1: x_dtype, 3: bc_dtype, 4: bc_dtype, 7: x_dtype}
    tensors = [x.to(low.get(i, torch.float32)) for i, x in enumerate(tensors)]
    weight = torch.randn(B, S, C, generator=torch.Generator().manual_seed(2)).to(x_dtype)

    def run(function, device, dtype, width):
        def place(x):
            if x.dim() != 3 or not width:
                return x.to(device, dtype)
            wide = torch.zeros(*x.shape[:2], x.shape[2] + width, dtype=dtype or x.dtype, device=device)
            wide[..., offset : offset + x.shape[2]] = x.to(wide)
            return wide[..., offset : offset + x.shape[2]]

        given = [place(x).requires_grad_() for x in tensors[:8]]
        y, state = function(*given)
        gradients = torch.autograd.grad(y, given, place(weight))
        assert all(g.dtype == x.dtype for g, x in zip(gradients, given, strict=True))
        return [x.double().cpu() for x in (y, state, *gradients)]

    expected = run(plain.selective_scan_reference, "cpu", torch.float64, 0)
    found = run(backend, device, None, 12)
    # bf16: every result is rounded; dB and dC are sums of products with 10 bits of mantissa.
    tolerance = 1e-2 if torch.bfloat16 in (x_dtype, bc_dtype) else 1e-5
    assert_close(found, expected, tolerance)


@over_devices
def test_gradients_land_in_their_slots(backend, device):
    """u, dt and z cut from longer and wider rows, as in the model: their gradients are those of plain tensors, and were
    written where the whole gradient lies."""
    B, S, C, M, extra = 2, 37, 64, 3, 6
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    whole = [random(M + B * S, width).requires_grad_() for width in (C, C, extra + C)]
    rest = [random(C, 16) * 0.1, random(B, S, 16), random(B, S, 16), random(C), random(C) - 3]
    dy = random(B, S, C)

    def run(split):
        wide = whole[2] * 1.0  # not a leaf, as in_proj's output
        z = split.columns(wide, [extra, C])[1]
        u, dt, z = (split.rows(x, [M, B * S])[1] for x in (whole[0] * 1.0, whole[1] * 1.0, z))
        u, dt, z = (view_with_slot(x, x.unflatten(0, (B, S))) for x in (u, dt, z))
        y, _ = backend(u, dt, rest[0], rest[1], rest[2], rest[3], rest[4], z)
        return torch.autograd.grad(y, whole, dy)

    ordinary = SimpleNamespace(columns=lambda x, n: x.split(n, 1), rows=lambda x, n: x.split(n, 0))
    expected = run(ordinary)
    copied = []
    with mock.patch.object(gradient_slots, "_is_same_memory", lambda a, b: copied.append(not same(a, b)) or same(a, b)):
        found = run(SimpleNamespace(columns=split_columns, rows=split_rows))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert copied and not any(copied)


@needs_emulator
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_equal_their_parts(packed, padding):
    """The function on flat rows against the reference with rows split and joined: y and all gradients; z's lies in its
    slot, nothing is copied there."""
    M, batch, seq, channels, states = 4, 2, 21, 64, 16
    rows, generator = M + batch * seq + padding, torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = [random(rows, channels), random(rows, channels), random(channels, states) * 0.1, random(rows, states),
              random(rows, states), random(channels), random(channels) - 3, random(rows, 8 + channels)]  # fmt: skip
    weight, ids = random(rows, channels), documents(batch, seq) if packed else None

    def run(name, dtype):
        given = [x.to(dtype).requires_grad_() for x in leaves]
        z = split_columns(given[7] * 1.0, [8, channels])[1]
        sizes = dict(num_meta=M, batch=batch, seq=seq, segment_ids=ids)
        backend = next(b for b in registry.BACKENDS["selective_scan"] if b.name == name)
        y = selective_scan_rows(Choice(backend, "cpu", "test"), *given[:7], z, **sizes)
        return [x.double() for x in (y, *torch.autograd.grad(y, given, weight.to(dtype)))]

    expected, copied = run("reference", torch.float64), []
    is_same = lambda a, b: copied.append(not same(a, b)) or same(a, b)  # noqa: E731
    kernels = mock.patch.object(scan, "_kernels", lambda x, bc, exact, device: emulated(x, bc, exact))
    with mock.patch.object(gradient_slots, "_is_same_memory", is_same), kernels:
        found = run("cuda", torch.float32)
    assert not found[0][M + batch * seq :].any()
    assert_close(found, expected, 1e-5)
    assert len(copied) > 6
    assert not any(copied)
    with kernels, torch.no_grad():
        given = [x.float() for x in (*leaves[:7], leaves[7][:, 8:])]
        backend = next(b for b in registry.BACKENDS["selective_scan"] if b.name == "cuda")
        y = selective_scan_rows(
            Choice(backend, "cpu", "test"), *given, num_meta=M, batch=batch, seq=seq, segment_ids=ids
        )
    assert_close([y.double()], expected[:1], 1e-5)


same = gradient_slots._is_same_memory


@over_devices
@pytest.mark.parametrize("through", ["y", "state"])
def test_gradient_through_one_result_alone(backend, device, through):
    tensors = inputs(B=1, S=20, C=3, N=4)

    def run(function, device, dtype):
        given = [x.detach().to(device, dtype).requires_grad_() for x in tensors]
        result = function(*given[:8], initial_state=given[8])[through == "state"]
        gradients = torch.autograd.grad(result.square().sum(), given, allow_unused=True, materialize_grads=True)
        return [x.double().cpu() for x in gradients]

    assert_close(run(backend, device, torch.float32), run(plain.selective_scan_reference, "cpu", torch.float64), 1e-5)


@over_devices
def test_windows_of_four_steps(backend, device, monkeypatch):
    monkeypatch.setitem(scan.BUILD, "BACKWARD_WINDOW", 4)
    monkeypatch.setitem(scan.BUILD, "BACKWARD_BLOCKS", 2)
    tensors, ids = inputs(B=2, S=70, C=67, N=16, state="rows"), documents(2, 70)
    expected = outputs_and_gradients(plain.selective_scan_reference, tensors, ids)
    assert_close(outputs_and_gradients(backend, tensors, ids, torch.float32, device), expected, 1e-5)


@over_devices
def test_two_runs_give_the_same_bits(backend, device, monkeypatch):
    monkeypatch.setattr(scan, "CHUNKS", scan.Chunks(32, 3, True))
    tensors, ids = inputs(B=2, S=70, C=67, N=16), documents(2, 70)
    first, second = (outputs_and_gradients(backend, tensors, ids, torch.float32, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_emulator
def test_no_checkpoints_without_gradients(monkeypatch):
    tensors = [x.detach().float().requires_grad_() for x in inputs(B=1, S=20, C=3, N=4)]
    made, new = [], scan._Run.new
    monkeypatch.setattr(scan._Run, "new", lambda run, name, *rest: made.append(name) or new(run, name, *rest))
    with torch.no_grad():
        y, state = emulated_backend(*tensors[:8], initial_state=tensors[8])
    assert made == ["final_state"]  # and the output, but nothing for a backward pass
    assert y.grad_fn is None
    expected = plain.selective_scan_reference(*(x.double() for x in tensors[:8]), initial_state=tensors[8].double())
    assert_close([y.double(), state.double()], expected, 1e-5)


def test_chunks_follow_the_work():
    prefix = scan.choose_chunks(1, 128, 3200, 132, 256)
    assert prefix.count == 1
    assert scan.choose_chunks(4, 2048, 3200, 132, 256) == scan.Chunks(256, 8, True)
    assert scan.choose_chunks(4, 2048, 3200, 132, 128) == scan.Chunks(128, 16, True)
    alone = scan.choose_chunks(1, 8192, 3200, 132, 256)
    assert not alone.chained
    assert alone.count * 50 <= 4 * 132
    for batch in (1, 2, 3, 8):
        for num_tokens in (1, 255, 257, 2048, 8191):
            chunks = scan.choose_chunks(batch, num_tokens, 100, 132, 256)
            assert chunks.tokens % scan.TILE_TOKENS == 0
            assert (chunks.count - 1) * chunks.tokens < num_tokens <= chunks.count * chunks.tokens


@needs_emulator
def test_the_backward_may_cut_time_otherwise_than_the_forward(monkeypatch):
    cuts = {"forward": 48, "backward": 32}
    monkeypatch.setattr(scan, "CHAIN_TOKENS", cuts)
    monkeypatch.setattr(
        scan, "choose_chunks", lambda batch, tokens, *rest: scan.Chunks(rest[-1], -(-tokens // rest[-1]), True)
    )
    tensors, ids = inputs(B=2, S=70, C=67, N=16), documents(2, 70)
    expected = outputs_and_gradients(plain.selective_scan_reference, tensors, ids)
    assert_close(outputs_and_gradients(emulated_backend, tensors, ids, torch.float32, "cpu"), expected, 1e-5)


def test_refuses_what_it_cannot_do():
    tensors = [x.float() for x in inputs(N=17)[:8]]
    with pytest.raises(UserError, match=r"at most 16 as mamba_state_dim, not 17; use 'triton' or 'torch'"):
        scan.selective_scan_cuda(*tensors)
    with pytest.raises(UserError, match=r"'cuda' runs on cuda, not on cpu"):
        scan.selective_scan_cuda(*(x.float() for x in inputs()[:8]))
    with pytest.raises(UserError, match=r"'cuda' .*has no more than 16 states"):
        select("selective_scan", "cuda", "cuda", needs={"wide_state"})


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("size", [(4, 2048), (1, 8192), (8, 512), (1, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_at_model_sizes(size, packed):
    tensors = inputs(B=size[0], S=size[1], C=3200, N=16)
    ids = documents(*size, often=0.003) if packed else None
    expected = outputs_and_gradients(plain.selective_scan, tensors, ids, torch.float32, "cuda")
    backend = select("selective_scan", "cuda", "cuda", needs={"segment_ids", "state_grad", "deterministic"})
    found, again = (outputs_and_gradients(backend, tensors, ids, torch.float32, "cuda") for _ in range(2))
    assert_close(found, expected, 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
