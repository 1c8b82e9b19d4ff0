"""Numbers of attention rows by head: where the mass goes, how spread it is, how far back it reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CATEGORIES = ("meta", "bos", "self", "cross")


class HeadStats:
    """Sums over the text queries of any number of sequences, for the H heads of one branch of one layer.

    All means are over text queries; meta tokens as queries are not looked at.
    """

    def __init__(self) -> None:
        self.num_queries = self.num_sequences = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, rows: Tensor, first: int, num_meta: int) -> None:
        """Rows [H, Q, T] that sum to 1, of the queries first .. first + Q - 1 of one sequence of T = M + S tokens."""
        last = first + rows.shape[1]
        if last <= num_meta:
            return
        rows = rows[:, max(0, num_meta - first) :]
        query = torch.arange(max(first, num_meta), last, device=rows.device)
        diagonal = rows.gather(2, query[None, :, None].expand(len(rows), -1, 1))[..., 0]
        bos = rows[..., num_meta]
        meta = rows[..., :num_meta].sum(-1)
        own = torch.where(query == num_meta, 0, diagonal)  # the first token's own mass is BOS's
        text = rows[..., num_meta:]
        share = text.sum(-1).clamp(min=torch.finfo(rows.dtype).tiny)
        found = {
            "meta": meta, "bos": bos, "self": own, "cross": 1 - meta - bos - own,
            "entropy": torch.special.entr(rows).sum(-1),
            # H of text / share, without making it
            "entropy_text": torch.special.entr(text).sum(-1) / share + share.log(),
        }  # fmt: skip
        for name, values in found.items():
            self._sum(name, values.double().sum(1))
        self._sum("meta_columns", rows[..., :num_meta].double().sum(1))
        self.num_queries += len(query)
        if last == rows.shape[2]:  # Eq. 5 asks for the last token alone
            distance = last - 1 - torch.arange(rows.shape[2], device=rows.device)
            self._sum("distance", (rows[:, -1].double() * distance).sum(-1))
            near = distance[num_meta:]
            self._sum("distance_text", (text[:, -1].double() * near).sum(-1) / share[:, -1])
            self.num_sequences += 1

    def _sum(self, name: str, values: Tensor) -> None:
        values = values.cpu()
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def mean(self, name: str) -> Tensor:
        """[H], or [H, M] of "meta_columns". ``distance`` is over sequences, all else over text queries."""
        count = self.num_sequences if name.startswith("distance") else self.num_queries
        return self.sums[name] / count


def receptive_field(distances: Sequence[float]) -> float:
    """Eq. 5 from the mean over heads of sum_s M(S, s) (S - s) in each of the N layers, the first one first.

    2 / (N (N + 1)) . sum_n (N - n + 1) . distances[n]: a mean over layers in which early ones weigh more.
    """
    n = len(distances)
    return 2 / (n * (n + 1)) * sum((n - i) * distance for i, distance in enumerate(distances))


def total_variation(rows: Tensor) -> Tensor:
    """[K, K]: half the L1 distance between the rows of a matrix [K, M], each brought to sum 1. 0 alike, 1 disjoint."""
    shares = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return (shares[:, None] - shares[None]).abs().sum(-1) / 2
