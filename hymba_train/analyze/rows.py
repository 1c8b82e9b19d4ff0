"""Rows of attention matrices: those of the heads, and those that a selective scan implies. Blocks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_train.analyze.record import AttentionInputs, ScanInputs

CPU_BLOCK, GPU_BLOCK = 2**18, 2**24  # elements of the largest tensor made at once; on a CPU it is to stay in its cache


def blocks(num_heads: int, num_tokens: int, device: torch.device) -> list[slice]:
    """All T queries in blocks whose [heads, queries, T] is not too large."""
    size = max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // (num_heads * num_tokens))
    return [slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size)]


def attention_rows(x: AttentionInputs, rows: slice) -> Tensor:
    """Probabilities [H, rows, T] of the queries ``rows`` of all T: float32 or wider, each row sums to 1.

    Key j is visible to query i iff j <= i and (the layer is global, or i - j <= W, or j is a meta token).
    """
    dtype = torch.promote_types(x.queries.dtype, torch.float32)
    num_groups, num_tokens, _ = x.keys.shape
    q = x.queries[rows].to(dtype).unflatten(1, (num_groups, -1))
    scores = torch.einsum("qgrd,gkd->grqk", q, x.keys.to(dtype)).flatten(0, 1)
    key = torch.arange(num_tokens, device=scores.device)
    query = key[rows, None]
    visible = key <= query
    if x.window is not None:
        visible &= (query - key <= x.window) | (key < x.num_meta)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def implied_rows(x: ScanInputs, rows: slice, channels: Tensor) -> Tensor:
    """alpha [channels, rows, T] of Eq. 2, signed: alpha(i, j) = C_i . prod_{k=j+1..i} exp(A delta_k) . B_j delta_j.

    For each channel sum_j alpha(i, j) u_j is what the scan puts out before the skip D u, gate and norm.
    """
    delta, A = x.delta[:, channels], x.A[channels]
    total = delta.double().cumsum(0)  # differences of large sums
    decay = (total[rows, None] - total).clamp(min=0).to(delta.dtype).permute(2, 0, 1)  # sum of delta over k = j+1 .. i
    alpha = torch.zeros_like(decay)
    for n in range(A.shape[1]):
        alpha += torch.exp(decay * A[:, n, None, None]) * (x.C[rows, n, None] * x.B[None, :, n])
    alpha *= delta.t()[:, None]
    key = torch.arange(delta.shape[0], device=delta.device)
    return alpha.masked_fill(key > key[rows, None], 0)


def normalised(alpha: Tensor) -> Tensor:
    """|alpha|, each row divided by its sum. The signs cannot be kept: signed rows may sum to anything, even 0."""
    size = alpha.abs()
    return size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)


def spread_channels(num_channels: int, wanted: int, device: torch.device | str = "cpu") -> Tensor:
    """``wanted`` channels (or all, if there are fewer), evenly spaced."""
    wanted = min(wanted, num_channels)
    return torch.arange(wanted, device=device) * num_channels // wanted
