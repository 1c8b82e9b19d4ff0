"""Output layer and cross-entropy over a padded vocabulary, in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Loss per token of the logits hidden @ weight.T. Backend ``torch``.

    Args:
        hidden: [N, D].
        weight: [V', D]; rows from vocab_size on pad the vocabulary: probability and gradient zero.
        labels: int64 [N]; not predicted where negative: loss and gradients zero.

    Returns:
        float32 [N] (float64 if hidden is).
    """
    logits = F.linear(hidden, weight)[:, :vocab_size]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    predicted = labels >= 0
    return F.cross_entropy(wide, labels.masked_fill(~predicted, 0), reduction="none") * predicted
