"""Synthetic sources: token files with document lengths as on the web, without any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hymba_train.data.indexed import HEADER, MAGIC, bin_path, idx_path
from hymba_train.data.indexed_writer import IndexedWriter

VOCAB_SIZE = 32001


def web_lengths(num_documents: int, seed: int = 0) -> np.ndarray:
    """Tokens of each document, int32: log-normal, median 545, mean about 1,000, as in web corpora."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(6.3, 1.1, num_documents), 2, 200_000).astype(np.int32)


def write_index_alone(prefix: Path, lengths: np.ndarray) -> None:
    """A .idx over a .bin that is a hole of the right size: packing never reads a token."""
    with open(bin_path(prefix), "wb") as stream:
        stream.truncate(int(lengths.sum(dtype=np.int64)) * 2)
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    with open(idx_path(prefix), "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, lengths.size, lengths.size + 1))
        stream.write(lengths.tobytes())
        stream.write(np.concatenate([[0], ends[:-1]]).tobytes())
        stream.write(np.arange(lengths.size + 1, dtype=np.int64).tobytes())


def write_source(prefix: Path, num_documents: int) -> None:
    """A whole source of random tokens."""
    rng = np.random.default_rng(1)
    with IndexedWriter(prefix, np.uint16) as writer:
        for begin in range(0, num_documents, 10_000):
            lengths = web_lengths(min(10_000, num_documents - begin), begin)
            tokens = rng.integers(3, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
            tokens[np.cumsum(lengths) - 1] = 2
            writer.add_documents(tokens, lengths)
        writer.publish()
