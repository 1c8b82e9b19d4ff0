"""Selective scan on a GPU: CUDA C++ kernels (ops/cuda), compiled at first use. Deterministic; float32 inside.

One pass over time where rows and channels fill the GPU, else chunks of time side by side. The forward keeps the state
before every 16th token (float32, 12.8 kB a token at 3200 channels), from which the backward recomputes the others, and
y before the gate (6.4 kB in bf16).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hymba_train.errors import UserError
from hymba_train.ops.gradient_slots import GradientSlot, empty_gradient, slot_of
from hymba_train.ops.nvrtc import Module
from hymba_train.ops.rows_triton import multiprocessors

TILE_TOKENS, BLOCK_CHANNELS, MAX_STATES, THREADS = 16, 64, 16, 128
PRIVATE_STATE = BLOCK_CHANNELS * MAX_STATES
FORWARD_SHARED = 29696
BACKWARD_SHARED = {2: 75776, 4: 59392}
"""Bytes of shared memory of a block, by window; checked against the layouts in ops/cuda when they are compiled."""
BUILD = {
    "FORWARD_BLOCKS": 4,
    "FORWARD_UNROLL": 8,
    "BACKWARD_BLOCKS": 3,
    "BACKWARD_WINDOW": 2,
    "HOLD_UNROLL": 7,
}
"""Blocks that a multiprocessor should hold (bounds the registers of a thread), steps that the backward keeps in
registers, and how far loops are unrolled."""
SOURCES = ("scan_common.cuh", "scan_backward.cu", "scan_forward.cu", "scan_chunk_gradients.cu", "scan_sums.cu")


@dataclass(frozen=True)
class Chunks:
    """How time is cut. ``chained``: a chunk waits for its neighbour, all else being ready; otherwise chunks run side by
    side, at the price of a first pass that finds the states between them."""

    tokens: int
    count: int
    chained: bool


CHAIN_TOKENS = {"forward": 256, "backward": 128}
"""Tokens of a chained chunk: short enough that multiprocessors finish together."""
PARALLEL_BLOCKS, MIN_PARALLEL_TOKENS = 4, 256
"""Blocks a multiprocessor wanted when chunks run side by side; rows not longer than this are not cut for it."""
CHUNKS: Chunks | None = None
"""Overrides choose_chunks, for tests and measurements."""


def choose_chunks(batch: int, num_tokens: int, channels: int, multiprocessors: int, chain_tokens: int) -> Chunks:
    """How a launch cuts time: not at all, in a chain, or side by side where chains do not fill the GPU."""
    if CHUNKS:
        return CHUNKS
    chains = batch * -(-channels // BLOCK_CHANNELS)
    if chains >= multiprocessors:
        if num_tokens > chain_tokens:
            return Chunks(chain_tokens, -(-num_tokens // chain_tokens), True)
    elif num_tokens > MIN_PARALLEL_TOKENS:
        count = PARALLEL_BLOCKS * multiprocessors // chains
        tokens = max(-(-num_tokens // (count * TILE_TOKENS)), 4) * TILE_TOKENS
        if tokens < num_tokens:
            return Chunks(tokens, -(-num_tokens // tokens), False)
    return Chunks(-(-num_tokens // TILE_TOKENS) * TILE_TOKENS, 1, False)


def selective_scan_cuda(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`hymba_train.ops.selective_scan.selective_scan`; backend ``cuda``.

    u, dt, z may be slices of wider rows.
    Raises UserError if there are more than 16 states a channel.
    """
    if A_log.shape[1] > MAX_STATES:
        raise UserError(
            f"selective_scan: backend 'cuda' has at most {MAX_STATES} as mamba_state_dim, not {A_log.shape[1]}; "
            "use 'triton' or 'torch'"
        )
    batch = u.shape[0]
    if initial_state is not None:
        initial_state = initial_state.float()
        if initial_state.dim() == 3 and initial_state.shape[0] != batch:
            initial_state = initial_state.squeeze(0)
        initial_state = initial_state.contiguous()
    if u.numel() == 0:
        first = u.new_zeros(()) if initial_state is None else initial_state
        return torch.zeros_like(u), first.float().expand(batch, *A_log.shape).clone()
    x = _alike(u, dt, z)
    slots = tuple(slot_of(t) if t is given else None for t, given in zip(x, (u, dt, z), strict=True))
    y, final = CudaScan.apply(
        *x, *_alike(B, C), *(x.float().contiguous() for x in (A_log, D, dt_bias)), initial_state,
        None if segment_ids is None else segment_ids.long(), torch.is_grad_enabled(), slots,
    )  # fmt: skip
    return y.to(u.dtype), final


class Params(ctypes.Structure):
    """struct Params of ops/cuda/scan_common.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "u", "dt", "z", "dy", "B", "C", "before", "A_log", "D", "bias", "initial", "d_final", "segments",
            "y", "du", "ddt", "dz", "dB", "dC", "final_state", "checkpoints", "carry", "sum_delta",
            "part_bc", "part_A", "part_D", "part_bias", "d_initial", "d_reset",
            "dA_log", "dD", "dbias", "d_initial_out", "sync", "keep",
        )),
        *((name + axis, ctypes.c_longlong) for name in ("u", "dt", "z", "dy", "B", "C") for axis in ("_row", "_token")),
        *((name, ctypes.c_longlong) for name in ("segment_row", "initial_row", "dz_token")),
        *((name, ctypes.c_int) for name in (
            "batch", "tokens", "channels", "states", "blocks", "chunk_tokens", "chunks", "chained",
        )),
    ]  # fmt: skip


class CudaScan(torch.autograd.Function):
    """u, dt, z of one dtype, B, C of one dtype; A_log, D, bias, initial ([C, N] or [B, C, N]) float32, contiguous.
    y: contiguous memory to write it to."""

    @staticmethod
    def forward(ctx, u, dt, z, B, C, A_log, D, bias, initial, segment_ids, grad_enabled, slots, y=None):
        run = _Run(_kernels, "forward", u=u, dt=dt, z=z, B=B, C=C, A_log=A_log, D=D, bias=bias)
        run.set_start(initial, segment_ids)
        if y is None:
            y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        run.set("y", y)
        final = run.new("final_state", (u.shape[0], *A_log.shape))
        checkpoints = before = None
        if grad_enabled and any(ctx.needs_input_grad):  # which says nothing of no_grad
            tiles = -(-u.shape[1] // TILE_TOKENS)
            checkpoints = run.new("checkpoints", (tiles, run.chains, PRIVATE_STATE))
            before = run.new("before", u.shape, u.dtype)
        run.between_chunks("scan_chunk_states", "scan_pass_states")
        run.launch("scan_forward", run.chains * run.chunks.count)
        if checkpoints is not None:
            ctx.save_for_backward(u, dt, z, B, C, A_log, D, bias, initial, segment_ids, checkpoints, before)
            ctx.find_kernels, ctx.slots = _kernels, slots
            ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, d_final):
        u, dt, z, B, C, A_log, D, bias, initial, segment_ids, checkpoints, before = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy
        run = _Run(ctx.find_kernels, "backward", u=u, dt=dt, z=z, dy=dy, B=B, C=C, A_log=A_log, D=D, bias=bias)
        chunks = run.chunks
        run.set_start(initial, segment_ids)
        run.set("checkpoints", checkpoints)
        run.set("before", before)
        run.set("d_final", None if d_final is None else _whole(d_final))
        du, ddt, dz = (
            run.new_gradient(name, slot, u) for name, slot in zip(("du", "ddt", "dz"), ctx.slots, strict=True)
        )
        dB, dC = (run.new(name, B.shape, B.dtype) for name in ("dB", "dC"))
        dA_log, dD, dbias = run.new("dA_log", A_log.shape), run.new("dD", D.shape), run.new("dbias", bias.shape)
        (batch, num_tokens, channels), num_states = u.shape, A_log.shape[1]
        parts = batch * chunks.count * channels
        run.work(
            part_bc=run.params.blocks * batch * num_tokens * 2 * MAX_STATES,
            part_A=parts * num_states, part_D=parts, part_bias=parts,
        )  # fmt: skip
        d_initial = None
        if initial is not None and ctx.needs_input_grad[8]:
            d_initial = run.new("d_initial_out", initial.shape)
            run.new("d_initial", (batch, channels, num_states))
            if segment_ids is not None:
                run.set("d_reset", u.new_zeros(batch, chunks.count, channels, num_states, dtype=torch.float32))
        run.between_chunks("scan_chunk_gradients", "scan_pass_gradients")
        run.launch("scan_backward", run.chains * chunks.count)
        run.launch("scan_sum", -(-batch * num_tokens * 8 // THREADS) + -(-channels * max(num_states, 1) // THREADS))
        return du, ddt, dz, dB, dC, dA_log, dD, dbias, d_initial, None, None, None


class _Run:
    """Parameters of the kernels of one forward or backward, and the tensors they point to."""

    def __init__(self, find: Callable[..., Module], way: str, **tensors: Tensor) -> None:
        u, A_log = tensors["u"], tensors["A_log"]
        self.device = u.device
        batch, num_tokens, channels = u.shape
        self.chunks = chunks = choose_chunks(batch, num_tokens, channels, multiprocessors(u.device), CHAIN_TOKENS[way])
        self.params = p = Params()
        self.tensors: list[Tensor] = []
        p.batch, p.tokens, p.channels, p.states = batch, num_tokens, channels, A_log.shape[1]
        p.blocks = -(-p.channels // BLOCK_CHANNELS)
        p.chunk_tokens, p.chunks, p.chained = chunks.tokens, chunks.count, chunks.chained and chunks.count > 1
        self.chains = p.batch * p.blocks
        # Without guards in the kernels: see EXACT in scan_common.cuh.
        exact = p.channels % BLOCK_CHANNELS == 0 and p.states == MAX_STATES
        for name, width in (("u", 2), ("dt", 2), ("z", 2), ("dy", 2), ("B", 4), ("C", 4)):
            if name not in tensors:
                continue
            x = tensors[name]
            if x.stride(2) != 1:
                x = x.contiguous()
            self.set(name, x)
            setattr(p, f"{name}_row", x.stride(0))
            setattr(p, f"{name}_token", x.stride(1))
            exact &= not (x.data_ptr() % (width * x.element_size()) or x.stride(0) % width or x.stride(1) % width)
        for name in ("A_log", "D", "bias"):
            self.set(name, tensors[name])
        self.kernels = find(u.dtype, tensors["B"].dtype, exact, u.device)

    def set(self, name: str, x: Tensor | None) -> None:
        if x is not None:
            self.tensors.append(x)
            setattr(self.params, name, x.data_ptr())

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        self.set(name, x)
        return x

    def new_gradient(self, name: str, slot: GradientSlot | None, like: Tensor) -> Tensor:
        """Memory for a gradient [B, S, C]: its slot, if this kernel can write there."""
        x = (
            torch.empty_like(like, memory_format=torch.contiguous_format)
            if slot is None
            else empty_gradient(slot, like)
        )
        in_order = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
        aligned = x.data_ptr() % 16 == 0 and x.stride(1) % 2 == 0
        if not (in_order and aligned and (name == "dz" or x.is_contiguous())):
            x = torch.empty_like(like, memory_format=torch.contiguous_format)
        if name == "dz":
            self.params.dz_token = x.stride(1)
        self.set(name, x)
        return x

    def work(self, **sizes: int) -> None:
        """Scratch of so many 4-byte numbers each, in one allocation."""
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name], total = total, total + -(-size // 64) * 64
        scratch = torch.empty(total, dtype=torch.float32, device=self.device)
        self.tensors.append(scratch)
        for name, start in starts.items():
            setattr(self.params, name, scratch.data_ptr() + 4 * start)

    def set_start(self, initial: Tensor | None, segment_ids: Tensor | None) -> None:
        p = self.params
        if initial is not None:
            self.set("initial", _whole(initial))
            p.initial_row = initial[0].numel() if initial.dim() == 3 else 0
        if segment_ids is not None:
            segment_ids = segment_ids if segment_ids.stride(1) == 1 else segment_ids.contiguous()
            self.set("segments", segment_ids)
            p.segment_row = segment_ids.stride(0)

    def between_chunks(self, name: str, pass_name: str) -> None:
        """What the chunks need to know of each other: nothing, a chain, or a first pass (kernels ``name``)."""
        p, chunks = self.params, self.chunks
        if chunks.count == 1:
            return
        if chunks.chained:
            self.work(carry=self.chains * PRIVATE_STATE)
            self.set("sync", torch.zeros(1 + self.chains, dtype=torch.int32, device=self.device))
            return
        self.work(
            carry=chunks.count * self.chains * PRIVATE_STATE,
            sum_delta=chunks.count * self.chains * BLOCK_CHANNELS,
            keep=chunks.count * p.batch,
        )
        self.launch(name, self.chains * (chunks.count - 1))
        self.launch(pass_name, self.chains * (PRIVATE_STATE // THREADS))

    def launch(self, name: str, blocks: int) -> None:
        self.kernels.launch(name, blocks, THREADS, shared_bytes().get(name, 0), self.params)


def _whole(x: Tensor) -> Tensor:
    """x contiguous, at an address that loads of 16 bytes can use."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All bf16, or all float32."""
    low = all(x.dtype == torch.bfloat16 for x in tensors)
    return tensors if low else tuple(x.float() for x in tensors)


def source() -> str:
    folder = Path(__file__).with_name("cuda")
    return "".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)


def shared_bytes() -> dict[str, int]:
    """Shared memory of a block of each kernel that has any."""
    over_time = dict.fromkeys(("scan_forward", "scan_chunk_states", "scan_chunk_gradients"), FORWARD_SHARED)
    return over_time | {"scan_backward": BACKWARD_SHARED[BUILD["BACKWARD_WINDOW"]]}


def defines(x_dtype: torch.dtype, bc_dtype: torch.dtype, exact: bool) -> dict[str, int]:
    """Preprocessor names of the kernels for these dtypes; ``exact``: without guards at the ends of channels."""
    kind = {"X_BF16": x_dtype == torch.bfloat16, "BC_BF16": bc_dtype == torch.bfloat16, "EXACT": exact}
    build = dict(BUILD)
    if x_dtype == torch.float32:  # inputs take twice the registers
        build["BACKWARD_BLOCKS"] = min(build["BACKWARD_BLOCKS"], 2)
    shared = {f"{name.upper()}_SHARED": size for name, size in shared_bytes().items() if "chunk" not in name}
    return {k: int(v) for k, v in kind.items()} | build | shared


def _kernels(x_dtype: torch.dtype, bc_dtype: torch.dtype, exact: bool, device: torch.device) -> Module:
    if device.type != "cuda":
        raise UserError(f"selective_scan: backend 'cuda' runs on cuda, not on {device.type}; use 'torch'")
    return _compiled(x_dtype, bc_dtype, exact, device.index, tuple(BUILD.values()))


@functools.cache
def _compiled(
    x_dtype: torch.dtype, bc_dtype: torch.dtype, exact: bool, device_index: int, build: tuple[int, ...]
) -> Module:
    return Module(source(), defines(x_dtype, bc_dtype, exact), device_index)
