"""Which documents are duplicates: equal texts, or near ones by MinHash and locality-sensitive hashing.

Signatures come from the library ``rensa`` (docs/data.md says why that one). Banding is done here, by sorting the
hashes of one band at a time: eight bytes a document in memory instead of a table of Python objects a band, and a
result that does not depend on the order of insertion. Parameters follow FineWeb: 5-grams of words, 112 hashes in 14
bands of 8 (Penedo et al., arXiv:2406.17557).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hymba_train.data.extras import import_extra

SIGNATURE_SEED = 1
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DedupSettings:
    """What decides which documents stay.

    Attributes:
        method: ``exact`` (equal text) or ``minhash`` (that, and near duplicates).
        ngram_words: words of a shingle.
        num_hashes: of a signature; a multiple of num_bands.
        num_bands: documents that agree in all hashes of a band are compared.
        threshold: documents whose signatures agree in this share of the hashes (which estimates the Jaccard
            similarity of their shingles) or more are duplicates.
    """

    method: str = "exact"
    json_key: str = "text"
    ngram_words: int = 5
    num_hashes: int = 112
    num_bands: int = 14
    threshold: float = 0.75


@dataclass
class ShardHashes:
    """What pass 1 keeps of a shard: the record number of each document, its text's hash [2], its signature or None."""

    records: np.ndarray
    exact: np.ndarray
    signatures: np.ndarray | None


def signatures_of(texts: Sequence[str], settings: DedupSettings) -> np.ndarray:
    """MinHash signatures, uint32 [texts, num_hashes]. Texts without a word get random-looking ones of their own."""
    rensa = import_extra("rensa", "MinHash")
    shingles = [_shingles(text, settings.ngram_words) for text in texts]
    rows = rensa.RMinHash.digests_from_token_sets(shingles, settings.num_hashes, SIGNATURE_SEED)
    return np.array(rows, dtype=np.uint32).reshape(len(texts), settings.num_hashes)


def _shingles(text: str, ngram_words: int) -> list[str]:
    words = _WORD.findall(text.lower())
    if not words:
        return [text]  # alike only if equal
    return [" ".join(words[i : i + ngram_words]) for i in range(max(1, len(words) - ngram_words + 1))]


def find_duplicates(hashes: Sequence[ShardHashes], settings: DedupSettings) -> tuple[np.ndarray, np.ndarray]:
    """(number of the document that stays in its place, or -1 for those that stay; similarity to it), over all shards.

    int64 and float32 [documents]. The similarity is 1 for equal texts, else what the signatures agree in with the
    document through which the pair was found.
    """
    exact = np.concatenate([h.exact for h in hashes] or [np.empty((0, 2), np.uint64)])
    leader = np.arange(exact.shape[0])
    similarity = np.zeros(exact.shape[0], dtype=np.float32)
    order = np.lexsort((exact[:, 1], exact[:, 0]))  # stable: equal texts keep the order of the input
    for group in _runs(exact[order]):
        members = order[group]
        leader[members[1:]] = members[0]
        similarity[members[1:]] = 1
    if settings.method == "minhash":
        _join_near(hashes, settings, leader, similarity)
    return np.where(leader == np.arange(leader.size), -1, leader), similarity


def _runs(keys: np.ndarray) -> list[slice]:
    """Runs of at least two equal rows (or values) of a sorted array."""
    if len(keys) < 2:
        return []
    equal = keys[1:] == keys[:-1]
    equal = equal.all(axis=1) if equal.ndim == 2 else equal
    edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.view(np.int8), [0]])))
    return [slice(begin, end + 1) for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]


def _join_near(
    hashes: Sequence[ShardHashes], settings: DedupSettings, leader: np.ndarray, similarity: np.ndarray
) -> None:
    """Union-find over near duplicates; ``leader`` ends up as the first document of each cluster."""
    signatures = _Rows([h.signatures for h in hashes])
    rows_each = settings.num_hashes // settings.num_bands
    candidates = np.flatnonzero(leader == np.arange(leader.size))  # of equal texts one is enough

    def root(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = int(leader[i])
        return i

    for band in range(settings.num_bands):
        keys = signatures.band_keys(candidates, slice(band * rows_each, (band + 1) * rows_each))
        order = np.argsort(keys, kind="stable")
        for group in _runs(keys[order]):
            left = np.sort(candidates[order[group]])
            while left.size > 1:
                agreement = (signatures[left[1:]] == signatures[left[:1]]).mean(axis=1)
                alike = agreement >= settings.threshold
                for i, share in zip(left[1:][alike].tolist(), agreement[alike].tolist(), strict=True):
                    a, b = sorted((root(int(left[0])), root(i)))
                    leader[b] = a
                    similarity[i] = max(similarity[i], share)
                left = left[1:][~alike]
    for i in range(leader.size):
        leader[i] = root(i)


class _Rows:
    """Rows of several arrays end to end, without copying them together."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n, width] with ascending numbers ``rows``."""
        which = np.searchsorted(self.ends, rows, side="right")
        pieces = [self.parts[p][rows[which == p] - (self.ends[p] - len(self.parts[p]))] for p in np.unique(which)]
        return np.concatenate(pieces)

    def band_keys(self, rows: np.ndarray, columns: slice) -> np.ndarray:
        """One uint64 a row for the hashes in ``columns``: equal hashes, equal key."""
        width = columns.stop - columns.start
        multipliers = np.random.default_rng(0).integers(2**63, size=width, dtype=np.uint64) | np.uint64(1)
        keys = np.empty(len(rows), dtype=np.uint64)
        for begin in range(0, len(rows), 2**20):
            block = self[rows[begin : begin + 2**20]][:, columns].astype(np.uint64)
            keys[begin : begin + 2**20] = (block * multipliers).sum(axis=1, dtype=np.uint64)
        return keys
