"""The flat token axis: meta tokens once, then the text of every sequence.

The meta tokens come first and attention is causal, so what they become depends on the parameters alone. A micro-batch
therefore carries them once, and every token-wise module sees one axis of N rows::

    row 0 .. M-1            meta tokens
    row M + b*S + s         token s of sequence b
    row M + B*S .. N-1      zero rows, where sequence parallelism needs N to divide

Only attention, convolution and scan tell the parts apart. It is exact (design.md, bench/README.md) and saves the
meta tokens' work for all sequences but one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_train.ops.gradient_slots import split_rows, view_with_slot
from hymba_train.ops.rope import rope_tables
from hymba_train.ops.segments import rows_reach


def num_token_rows(num_meta_tokens: int, batch: int, seq: int, multiple: int = 1) -> int:
    """Rows N of a micro-batch, a multiple of ``multiple``."""
    rows = num_meta_tokens + batch * seq
    return -(-rows // multiple) * multiple


@dataclass(frozen=True)
class TokenRows:
    """Sizes of a micro-batch and the two directions between flat rows and parts."""

    num_meta: int  # M
    batch: int  # B
    seq: int  # S
    num_rows: int  # N

    @property
    def counts(self) -> tuple[int, int, int]:
        """Rows of meta tokens, of text, of padding."""
        return self.num_meta, self.batch * self.seq, self.num_rows - self.num_meta - self.batch * self.seq

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[N, ...] -> meta [M, ...], text [B, S, ...] (views), whose gradients meet in one tensor, without a sum."""
        meta, text, _ = split_rows(rows if rows.dim() == 2 else rows.flatten(1), self.counts)
        if rows.dim() > 2:
            meta, text = (part.unflatten(1, rows.shape[1:]) for part in (meta, text))
        return meta, view_with_slot(text, text.unflatten(0, (self.batch, self.seq)))

    def text(self, rows: Tensor) -> Tensor:
        """[N, ...] -> text [B, S, ...]: an ordinary view, which may be written to."""
        return rows[self.num_meta : self.num_meta + self.batch * self.seq].unflatten(0, (self.batch, self.seq))

    def join(self, meta: Tensor, text: Tensor) -> Tensor:
        """meta [M, ...], text [B, S, ...] -> [N, ...]."""
        parts = [meta, text.flatten(0, 1)]
        if self.counts[2]:
            parts.append(text.new_zeros(self.counts[2], *text.shape[2:]))
        return torch.cat(parts)


@dataclass(frozen=True)
class BatchContext:
    """What every layer of a stage needs to know of a micro-batch."""

    rows: TokenRows
    cos: Tensor  # [N, dk] float32
    sin: Tensor
    segment_ids: Tensor | None  # [B, S]
    document_ends: Tensor | None  # see hymba_train.ops.segments
    reach: Tensor  # int32 [N], likewise: of the convolution

    @classmethod
    def of(
        cls, rows: TokenRows, positions: Tensor | None, segment_ids: Tensor | None, document_ends: Tensor | None,
        head_dim: int, rotary_base: float, num_taps: int, device: torch.device,
    ) -> BatchContext:  # fmt: skip
        """RoPE positions: 0..M-1 for meta tokens, M + position for text (in its document; None: in its sequence).

        ``num_taps``: inputs before its own that a convolution looks at.
        """
        if positions is None:
            positions = torch.arange(rows.seq, device=device).expand(rows.batch, -1)
        meta = torch.arange(rows.num_meta, device=device)
        cos, sin = rope_tables(rows.join(meta, positions + rows.num_meta), head_dim, rotary_base)
        reach = rows_reach(rows.num_meta, rows.batch, rows.seq, rows.num_rows, segment_ids, num_taps, device)
        return cls(rows, cos, sin, segment_ids, document_ends, reach)
