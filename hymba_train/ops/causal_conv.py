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
