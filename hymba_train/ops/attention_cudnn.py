"""Attention through cuDNN's fused kernels (Transformer Engine), the meta prefix joined by log-sum-exp.

cuDNN knows causal masks, windows and packed sequences, but no prefix that stays visible. So it attends over the text
alone, and one small kernel adds the meta keys and merges the two softmaxes (:mod:`.attention_meta_kernels`). In the
backward pass both parts get the merged output and log-sum-exp, from which each computes its exact share. Measured
against FlexAttention in benchmarks/.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_train.ops import segments
from hymba_train.ops.rows_triton import multiprocessors

ROWS = 64
"""Query rows of an item in the kernels of the meta prefix."""
MERGE_WARPS, MERGE_STAGES, MERGE_PROGRAMS = 4, 2, 2
BACKWARD_WARPS, BACKWARD_STAGES, BACKWARD_PROGRAMS = 8, 3, 1
"""Warps of a program, items whose loads are under way, and programs a multiprocessor has room for: the grid is one
wave, in which every program has as many items as the others."""


def attention_cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta_q: Tensor,
    meta_k: Tensor,
    meta_v: Tensor,
    *,
    window: int | None,
    scale: float,
    kv_index: Tensor | None = None,
    segment_ids: Tensor | None = None,
    document_ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`hymba_train.ops.attention.attention`; backend ``cudnn`` (bf16, fp16; dk and dv multiples of 8 up to 128).

    Documents are packed sequences to cuDNN. Without ``document_ends`` the host waits for the device to count them.
    """
    if segment_ids is not None and document_ends is None:
        document_ends = segments.document_ends(segment_ids)
    if kv_index is not None:
        k, v, meta_k, meta_v = (x.index_select(-2, kv_index) for x in (k, v, meta_k, meta_v))
    num_meta = meta_k.shape[0]
    if q.numel() == 0:
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    elif num_meta:
        out = _MetaAndText.apply(q, k, v, meta_k, meta_v, window, scale, document_ends)
    else:
        out = _Causal.apply(q, k, v, window, scale, document_ends)
    if num_meta == 0:
        return out, meta_q.new_zeros(*meta_q.shape[:-1], v.shape[-1])
    return out, _Causal.apply(meta_q[None], meta_k[None], meta_v[None], None, scale, None)[0]


class _Causal(torch.autograd.Function):
    """q [B, S, H, dk], k [B, S, G, dk], v [B, S, G, dv] -> [B, S, H, dv]; window None: all of the past.

    ends: int32 [documents + 1], or None: every row is one document.
    """

    @staticmethod
    def forward(ctx, q, k, v, window, scale, ends):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse, rng_state = fused_forward(q, k, v, window, scale, ends)
        ctx.save_for_backward(q, k, v, out, lse, rng_state, ends)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse, rng_state, ends = ctx.saved_tensors
        gradients = fused_backward(q, k, v, out, d_out.contiguous(), lse, rng_state, ctx.window, ctx.scale, ends)
        return *gradients, None, None, None


class _MetaAndText(torch.autograd.Function):
    """As _Causal, with meta_k [M, G, dk], meta_v [M, G, dv] visible to every query."""

    @staticmethod
    def forward(ctx, q, k, v, meta_k, meta_v, window, scale, ends):
        q, k, v, meta_k, meta_v = (x.contiguous() for x in (q, k, v, meta_k, meta_v))
        text, text_lse, rng_state = fused_forward(q, k, v, window, scale, ends)
        out, lse = torch.empty_like(text), torch.empty_like(text_lse)
        launch = MetaLaunch.of(q, meta_k, meta_v, lse, scale)
        launch.merge(q, meta_k, meta_v, text, text_lse, out, lse)
        ctx.save_for_backward(q, k, v, meta_k, meta_v, out, lse, rng_state, ends)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, meta_k, meta_v, out, lse, rng_state, ends = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_q, d_k, d_v = fused_backward(q, k, v, out, d_out, lse, rng_state, ctx.window, ctx.scale, ends)
        launch = MetaLaunch.of(q, meta_k, meta_v, lse, ctx.scale)
        d_meta_k, d_meta_v = launch.backward(q, meta_k, meta_v, out, d_out, lse, d_q)
        return d_q, d_k, d_v, d_meta_k, d_meta_v, None, None, None


@dataclass(frozen=True)
class MetaLaunch:
    """Sizes that both kernels of the meta prefix share. All tensors contiguous; lse float32 as cuDNN has it:
    [B, H, S, 1], or [B * S, H, 1] of packed sequences."""

    num_rows: int
    seq: int
    heads: int
    groups: int
    dk: int
    dv: int
    num_meta: int
    scale: float
    lse_strides: tuple[int, int, int]

    @classmethod
    def of(cls, q: Tensor, meta_k: Tensor, meta_v: Tensor, lse: Tensor, scale: float) -> MetaLaunch:
        """Of q [B, S, H, dk], meta_k [M, G, dk], meta_v [M, G, dv] and the forward pass's ``lse``."""
        batch, seq, heads, dk = q.shape
        num_meta, groups, dv = meta_v.shape
        row, head, token = lse.stride()[:3] if lse.ndim == 4 else (seq * heads, 1, heads)
        return cls(batch * seq, seq, heads, groups, dk, dv, num_meta, scale, (row, head, token))

    def _grid(self, programs: int, device: torch.device) -> tuple[int, int]:
        """(strips, items of a program): strips for every KV head fill ``programs`` a multiprocessor."""
        items = -(-self.num_rows // ROWS) * (self.heads // self.groups)
        each = -(-items // max(1, programs * multiprocessors(device) // self.groups))
        return -(-items // each), each

    def _arguments(self, items: int) -> tuple:
        return (
            self.num_rows, self.num_meta, self.seq, self.scale, self.heads * self.dk, self.heads,
            self.heads // self.groups, items, *self.lse_strides,
        )  # fmt: skip

    @property
    def _constants(self) -> dict:
        meta = max(16, 1 << (self.num_meta - 1).bit_length())
        return dict(DK=self.dk, DV=self.dv, ROWS=ROWS, META=meta, LONG=self.seq >= ROWS)

    def merge(
        self, q: Tensor, meta_k: Tensor, meta_v: Tensor, text: Tensor, text_lse: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """out, lse := attention over text and meta keys, from attention over the text."""
        from hymba_train.ops.attention_meta_kernels import merge_meta

        strips, items = self._grid(MERGE_PROGRAMS, q.device)
        with torch.cuda.device_of(q):
            merge_meta[strips, self.groups](
                q, meta_k, meta_v, text, text_lse, out, lse, *self._arguments(items), **self._constants,
                STAGES=MERGE_STAGES, num_warps=MERGE_WARPS,
            )  # fmt: skip

    def backward(
        self, q: Tensor, meta_k: Tensor, meta_v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, d_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(d_meta_k, d_meta_v); adds the meta keys' part to d_q in place. Deterministic."""
        from hymba_train.ops.attention_meta_kernels import meta_backward

        strips, items = self._grid(BACKWARD_PROGRAMS, q.device)
        shape = (strips, self.num_meta, self.groups, self.dk + self.dv)
        partial = torch.empty(shape, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            meta_backward[strips, self.groups](
                q, meta_k, meta_v, out, d_out, lse, d_q, partial, *self._arguments(items), **self._constants,
                STAGES=BACKWARD_STAGES, num_warps=BACKWARD_WARPS,
            )  # fmt: skip
        return tuple(x.to(q.dtype) for x in partial.sum(0).split((self.dk, self.dv), -1))


def fused_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, ends: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention: out [B, S, H, dv], log-sum-exp float32 [B, H, S, 1] or, with ends, [B * S, H, 1], and cuDNN's
    random state, which is not used."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_fwd

    packed = _Packing.of(q, ends)
    out, context, *_ = fused_attn_fwd(
        True, q.shape[1], q.shape[1], packed.ends, packed.ends, *map(packed.view, (q, k, v)), q.dtype,
        FusedAttnBackend["F16_arbitrary_seqlen"], attn_scale=scale, **packed.settings(window),
    )  # fmt: skip
    return out.view(*q.shape[:-1], v.shape[-1]), context[0], context[1]


def fused_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, rng_state: Tensor,
    window: int | None, scale: float, ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_q, d_k, d_v) of these keys' share in a softmax with output ``out`` and log-sum-exp ``lse``."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd

    packed = _Packing.of(q, ends)
    gradients = fused_attn_bwd(
        q.shape[1], q.shape[1], packed.ends, packed.ends, *map(packed.view, (q, k, v, out, d_out)), q.dtype,
        [lse, rng_state], FusedAttnBackend["F16_arbitrary_seqlen"], attn_scale=scale, do_format=packed.format,
        dqkv_layout=packed.layout,
        deterministic=torch.are_deterministic_algorithms_enabled(), **packed.settings(window),
    )  # fmt: skip
    return tuple(g.view_as(x) for g, x in zip(gradients, (q, k, v), strict=False))


@dataclass(frozen=True)
class _Packing:
    """Rows of equal length (bshd), or documents one after the other on a flat axis (thd)."""

    ends: Tensor
    padded: Tensor | None
    format: str

    @classmethod
    def of(cls, q: Tensor, ends: Tensor | None) -> _Packing:
        if ends is None:
            return cls(_row_ends(q.shape[0], q.shape[1], q.device), None, "bshd")
        return cls(ends, ends, "thd")

    @property
    def layout(self) -> str:
        return "_".join([self.format] * 3)

    def view(self, x: Tensor) -> Tensor:
        return x if self.format == "bshd" else x.flatten(0, 1)

    def settings(self, window: int | None) -> dict:
        """Arguments that forward and backward share."""
        return dict(
            qkv_layout=self.layout, o_format=self.format, window_size=(-1 if window is None else window, 0),
            attn_mask_type="causal" if self.format == "bshd" else "padding_causal", bottom_right_diagonal=False,
            cu_seqlens_q_padded=self.padded, cu_seqlens_kv_padded=self.padded,
        )  # fmt: skip


@functools.cache  # never let go of: a CUDA graph may read it
def _row_ends(batch: int, seq: int, device: torch.device) -> Tensor:
    """int32 [B + 1]: 0, S, 2S, ..."""
    return torch.arange(0, (batch + 1) * seq, seq, dtype=torch.int32, device=device)
