"""How alike two sets of features of the same tokens are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def centred(x: Tensor) -> Tensor:
    """[P, d] in float64 with the mean over the P tokens taken away."""
    x = x.double()
    return x - x.mean(0)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of [P, d] and [P, d']: |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), both centred.

    In 0..1; 1 where one is the other turned, mirrored, scaled or shifted. 0 where a set does not vary.
    """
    x, y = centred(x), centred(y)
    norm = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return float(torch.linalg.norm(y.T @ x) ** 2 / norm) if norm > 0 else 0.0


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Mean over tokens of the cosine between the rows of [P, d] and [P, d]."""
    return float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean())


def pairwise(parts: list[Tensor], measure: Callable[[Tensor, Tensor], float]) -> Tensor:
    """Symmetric [K, K] of a measure between K sets of features."""
    found = torch.eye(len(parts), dtype=torch.float64)
    for i, x in enumerate(parts):
        for j in range(i):
            found[i, j] = found[j, i] = measure(x, parts[j])
    return found
