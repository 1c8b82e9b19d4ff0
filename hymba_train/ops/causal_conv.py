"""Depthwise causal convolution with bias and SiLU (hymba-architecture 2.4), channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.ops.segments import document_offsets


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    initial_taps: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu(conv(x) + bias); backend ``torch`` (any device, any floating dtype; sums in float32, float64 if x is).

    Args:
        x: [B, S, C].
        weight: [C, K]; weight[:, K - 1] multiplies the token itself, weight[:, 0] the one K - 1 before it.
        bias: [C].
        initial_taps: the K - 1 inputs before the first token, oldest first, [K - 1, C] or [B, K - 1, C]; None: zeros.
        segment_ids: int64 [B, S], one number per document; every document starts from initial_taps.

    Returns:
        [B, S, C] in x.dtype, and final_taps [B, K - 1, C]: the K - 1 inputs that a next token of the same (last)
        document would see, from initial_taps where the document is shorter than that.
    """
    batch, num_tokens, channels = x.shape
    num_taps = weight.shape[1] - 1
    if initial_taps is None:
        initial_taps = x.new_zeros(num_taps, channels)
    taps = initial_taps.to(x.dtype).expand(batch, num_taps, channels)
    padded = torch.cat((taps, x), dim=1)
    offsets = None if segment_ids is None else document_offsets(segment_ids)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.addcmul(bias.to(wide), x.to(wide), weight[:, num_taps].to(wide))
    for distance in range(1, num_taps + 1):
        past = padded[:, num_taps - distance : num_taps - distance + num_tokens]
        if offsets is not None:
            past = _restart(past, taps, offsets, distance)
        total = torch.addcmul(total, past.to(wide), weight[:, num_taps - distance].to(wide))
    return F.silu(total).to(x.dtype), _final_taps(padded, taps, offsets)


def causal_conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_meta: int, batch: int, seq: int,
    segment_ids: Tensor | None = None, reach: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`causal_conv` on the flat token axis (hymba_train.model.rows); backend ``torch``.

    x [N, C]: num_meta meta tokens (from zero taps), then batch * seq tokens of text, every document of which (by
    segment_ids [B, S]) starts from the last meta tokens; further rows are padding. Returns [N, C], padding zero.
    ``reach`` is what :func:`hymba_train.ops.segments.rows_reach` makes of the same segment_ids, for backends that would
    compute it in every layer; this one has no use for it.
    """
    end = num_meta + batch * seq
    meta, taps = causal_conv(x[:num_meta].unsqueeze(0), weight, bias)
    text = x[num_meta:end].unflatten(0, (batch, seq))
    out, _ = causal_conv(text, weight, bias, initial_taps=taps[0], segment_ids=segment_ids)
    return torch.cat((meta[0], out.flatten(0, 1), x.new_zeros(x.shape[0] - end, x.shape[1])))


def _restart(past: Tensor, taps: Tensor, offsets: Tensor, distance: int) -> Tensor:
    """past [B, n, C] holds the inputs ``distance`` tokens back; where that is before the document, take its taps."""
    row = (taps.shape[1] - distance + offsets).clamp(max=taps.shape[1] - 1)
    before = torch.gather(taps, 1, row.unsqueeze(-1).expand(*row.shape, taps.shape[2]))
    return torch.where((offsets >= distance).unsqueeze(-1), past, before)


def _final_taps(padded: Tensor, taps: Tensor, offsets: Tensor | None) -> Tensor:
    num_taps = taps.shape[1]
    last = padded[:, padded.shape[1] - num_taps :]
    if offsets is None or offsets.shape[1] == 0 or num_taps == 0:
        return last
    length = offsets[:, -1:] + 1  # of the last document
    position = torch.arange(num_taps, device=taps.device)  # row i lies num_taps - i before the next token
    row = (position + length).clamp(max=num_taps - 1)
    before = torch.gather(taps, 1, row.unsqueeze(-1).expand(-1, -1, taps.shape[2]))
    return torch.where((length >= num_taps - position).unsqueeze(-1), last, before)
