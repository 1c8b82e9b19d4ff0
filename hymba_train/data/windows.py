"""Cutting a run of tokens into samples of S + 1 tokens, and keeping their documents apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np

from hymba_train.data.indexed import IndexedTokens

IGNORED_LABEL = -100
"""Label of a position without loss."""


@dataclass(frozen=True)
class TokenRange:
    """Part of a tokenised source that begins and ends at a document border: its training or its held-out part.

    Attributes:
        tokens: the files.
        begin, end: offsets in tokens; end is exclusive.
        begin_document, end_document: the same in documents.
    """

    tokens: IndexedTokens
    begin: int
    end: int
    begin_document: int
    end_document: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin

    @property
    def num_documents(self) -> int:
        return self.end_document - self.begin_document


def split_held_out(tokens: IndexedTokens, fraction: float) -> tuple[TokenRange, TokenRange]:
    """(training part, held-out part): held out are the fewest last documents with ``fraction`` of all tokens."""
    border = tokens.num_documents
    if fraction > 0:
        # Exactly `fraction` would begin at this token; the document around it is held out whole.
        first_held_out = tokens.num_tokens - max(1, round(tokens.num_tokens * fraction))
        border = tokens.document_at(first_held_out) if tokens.num_tokens else 0
    middle = tokens.document_start(border)
    return (
        TokenRange(tokens, 0, middle, 0, border),
        TokenRange(tokens, middle, tokens.num_tokens, border, tokens.num_documents),
    )


class Sequences(Protocol):
    """Samples of one sequence length from a token range: :class:`Windows` or :class:`hymba_train.data.packs.Packs`."""

    part: TokenRange
    seq_length: int

    def __len__(self) -> int: ...

    def read(self, window: int) -> np.ndarray:
        """Tokens of a sample, int64 [S + 1]."""

    def borders(self, window: int) -> np.ndarray:
        """Places 1..S inside a sample at which another document, or the padding, starts, int64, ascending."""

    def num_tokens(self, window: int) -> int:
        """Tokens of a sample, of S + 1, that are no padding. Padding is at the end."""

    def offset(self, window: int, place: int = 0) -> int:
        """Offset in the file, in tokens, of the token at ``place`` of a sample."""


class Windows:
    """Plain concatenation: window i is tokens i*S .. i*S + S of the range.

    Neighbours share one token (the last label of one is the first input of the next), so that every token but the
    first is predicted exactly once in an epoch; up to S tokens at the end are left out.

    Args:
        part: the token range.
        seq_length: S.
    """

    def __init__(self, part: TokenRange, seq_length: int) -> None:
        self.part = part
        self.seq_length = seq_length
        self.num_windows = max(0, (part.num_tokens - 1) // seq_length)

    def __len__(self) -> int:
        return self.num_windows

    def offset(self, window: int, place: int = 0) -> int:
        """Offset in the file, in tokens, of the token at ``place`` of a window."""
        if not 0 <= window < self.num_windows:
            raise IndexError(f"window {window} is outside the {self.num_windows} of {self.part.tokens.prefix}")
        return self.part.begin + window * self.seq_length + place

    def read(self, window: int) -> np.ndarray:
        """Tokens of a window, int64 [S + 1]."""
        begin = self.offset(window)
        return self.part.tokens.tokens(begin, begin + self.seq_length + 1)

    def borders(self, window: int) -> np.ndarray:
        """Places 1..S inside a window at which another document starts, int64, ascending."""
        begin = self.offset(window)
        return self.part.tokens.document_starts(begin + 1, begin + self.seq_length + 1) - begin

    def num_tokens(self, window: int) -> int:
        """S + 1: a window has no padding."""
        return self.seq_length + 1


class Masked(TypedDict):
    """int64 [S] each."""

    labels: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


def mask_documents(tokens: np.ndarray, borders: np.ndarray) -> Masked:
    """Labels, positions and segment ids that keep the documents of one sample apart.

    Args:
        tokens: int64 [S + 1].
        borders: places 1..S at which another document starts.

    Returns labels, positions, segment_ids, int64 [S] each. The label is IGNORED_LABEL where the next token starts
    another document (nothing before a document foretells its start); positions count from 0 in each document, or in
    the piece of it that lies in this sample; segment ids count the sample's documents from 0.
    """
    seq_length = tokens.size - 1
    labels = tokens[1:].copy()
    positions = np.arange(seq_length, dtype=np.int64)
    segment_ids = np.zeros(seq_length, dtype=np.int64)
    if borders.size:
        labels[borders - 1] = IGNORED_LABEL
        # A document that starts at place S shows in the last label alone.
        inside = borders[:-1] if borders[-1] == seq_length else borders
        segment_ids[inside] = 1
        np.cumsum(segment_ids, out=segment_ids)
        positions -= np.concatenate([[0], inside])[segment_ids]
    return {"labels": labels, "positions": positions, "segment_ids": segment_ids}
