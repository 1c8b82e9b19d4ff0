"""Documents packed into one row: where they start, and how far a token is into its own."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(segment_ids: Tensor) -> Tensor:
    """bool [B, S]: True at the first token of each document (the first token of a row is one)."""
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def document_ends(segment_ids: Tensor, multiple: int = 1) -> Tensor:
    """int32 [D + 1]: 0, and the end of every document in the flat row order of segment_ids [B, S].

    Repeats the last end until D is a multiple of ``multiple``: empty documents, so that few sizes D occur. On a GPU the
    host waits for the count; of a batch that is still on the host it costs nothing.
    """
    begins = document_starts(segment_ids).flatten().nonzero()[:, 0]
    last = begins.new_full((1 + -begins.numel() % multiple,), segment_ids.numel())
    return torch.cat((begins, last)).int()


def document_offsets(segment_ids: Tensor) -> Tensor:
    """int64 [B, S]: 0 at the first token of each document of segment_ids [B, S], counting up within it."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    first = torch.where(document_starts(segment_ids), index, 0)
    return index - first.cummax(dim=1).values


def rows_reach(
    num_meta: int, batch: int, seq: int, num_rows: int, segment_ids: Tensor | None, most: int, device: torch.device
) -> Tensor:
    """int32 [N] on the flat token axis (hymba_train.model.rows): rows before each row that are of its own document.

    Not more than ``most``. Meta tokens, before whose first there is nothing to keep apart, have ``most``; padding -1.
    """
    reach = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    reach[:num_meta] = most
    if segment_ids is None:
        offsets = torch.arange(seq, device=device).expand(batch, seq)
    else:
        offsets = document_offsets(segment_ids)
    reach[num_meta : num_meta + batch * seq] = offsets.clamp(max=most).flatten().int()
    return reach
