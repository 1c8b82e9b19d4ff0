"""Block masks for FlexAttention by arithmetic on document borders: no [S, T] tensor is ever made.

``create_block_mask`` evaluates the rule for every pair of tokens first, a dense S x T mask a row of the batch (and its
int64 intermediates), just to reduce it to blocks. Here each query sees one unbroken stretch of text, from the start of
its document or window to itself, so two numbers a query decide which blocks hold visible pairs. The result is the same,
block for block; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hymba_train.ops.segments import document_offsets

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BLOCK = 128


def block_mask(
    num_tokens: int,
    num_meta: int,
    window: int | None,
    segment_ids: Tensor | None,
    mask_mod: MaskMod,
    device: torch.device,
) -> BlockMask:
    """Which blocks of keys [meta | text] each block of text queries attends to: not, in part, or in full.

    Args:
        num_tokens: S, at least 1; num_meta: M.
        window: distance to the furthest visible text key; None: all of the past.
        segment_ids: int64 [B, S], one number a document, a document unbroken in its row; None: one document a row.
        mask_mod: the rule itself, for the blocks of which a part is visible.

    The largest tensor on the way has B * (S / 128) * (T / 128) elements. Nothing waits for the GPU.
    """
    num_keys = num_meta + num_tokens
    query = torch.arange(num_tokens, device=device)[None]
    lowest = torch.zeros_like(query) if segment_ids is None else query - document_offsets(segment_ids)
    if window is not None:
        lowest = torch.maximum(lowest, query - window)  # first text key that each query sees; never falls along a row
    first = torch.arange(0, num_tokens, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=num_tokens - 1)
    key_first = torch.arange(0, num_keys, BLOCK, device=device) - num_meta  # as text tokens: meta tokens are below 0
    key_last = (key_first + BLOCK - 1).clamp(max=num_tokens - 1)
    # [B, query blocks, 1] against [key blocks]. The queries of a block together see lowest[first] .. last, unbroken.
    low_of_first, low_of_last = lowest[:, first, None], lowest[:, last, None]
    first, last = first[:, None], last[:, None]
    touched = (key_first < 0) | ((key_last >= low_of_first) & (key_first <= last))
    full = (key_last < 0) | ((key_first.clamp(min=0) >= low_of_last) & (key_last <= first))
    # A block that reaches beyond the tensors is not full: the kernel must ask.
    full &= (key_first + BLOCK <= num_tokens) & (first + BLOCK <= num_tokens)
    partial = _listed(touched & ~full)
    return BlockMask.from_kv_blocks(
        *partial, *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(num_tokens, num_keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, query blocks, key blocks] to (how many [B, 1, query blocks], their numbers first, int32)."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
