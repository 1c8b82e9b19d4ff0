"""Selective scan on the flat token axis: the meta tokens once, then every sequence's text from their final state on."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_train.ops.gradient_slots import split_rows, view_with_slot
from hymba_train.ops.registry import Choice


def selective_scan_rows(
    scan: Choice, u: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor, *,
    num_meta: int, batch: int, seq: int, segment_ids: Tensor | None,
) -> Tensor:  # fmt: skip
    """:func:`hymba_train.ops.selective_scan.selective_scan` by the chosen backend, from rows to rows.

    Args:
        u, dt, z: [N, channels]; B, C: [N, states]. Rows of meta tokens, text and padding.
        segment_ids: [batch, seq] of the text.

    Returns:
        y [N, channels], zero in the rows of padding.

    Of the backend ``cuda`` both scans are one autograd function and write their rows of one output; around the others
    the rows are split and joined.
    """
    rows, channel = (u, dt, B, C, z), (A_log, D, dt_bias)
    if scan.name == "cuda" and num_meta and u[num_meta:].numel():
        from hymba_train.ops.selective_scan_rows_cuda import can_scan_rows, selective_scan_rows_cuda

        if can_scan_rows(*rows, *channel):
            return selective_scan_rows_cuda(*rows, *channel, num_meta, batch, seq, segment_ids)
    counts = [num_meta, batch * seq, u.shape[0] - num_meta - batch * seq]
    meta, text = [], []
    for x in rows:
        meta_rows, text_rows, _ = split_rows(x, counts)
        meta.append(view_with_slot(meta_rows, meta_rows.unsqueeze(0)))
        text.append(view_with_slot(text_rows, text_rows.unflatten(0, (batch, seq))))

    def run(part: list[Tensor], initial_state: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        u, dt, B, C, z = part
        return scan(u, dt, A_log, B, C, D, dt_bias, z, initial_state=initial_state, segment_ids=segment_ids)

    meta_y, state = run(meta, None, None)
    text_y, _ = run(text, state[0], segment_ids)
    parts = [meta_y[0], text_y.flatten(0, 1)]
    if counts[2]:
        parts.append(parts[1].new_zeros(counts[2], u.shape[1]))
    return torch.cat(parts)
