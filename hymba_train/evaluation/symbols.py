"""Token ids that recall tasks are made of, chosen from a tokenizer's vocabulary the same way every time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError
from hymba_train.plan.recall import NUM_MARKS

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
ALPHABET = 16
"""Symbols of the selective-copying task."""


@dataclass(frozen=True)
class Symbols:
    """Keys and values are ordinary tokens and no id is both; marks are rare ones."""

    keys: np.ndarray  # int64
    values: np.ndarray  # int64
    equals: int  # between key and value
    end: int  # after a value
    ask: int  # before a question
    blank: int  # nothing to remember
    eod: int


def choose_symbols(tokenizer: Tokenizer, num_symbols: int, separators: Sequence[int] = ()) -> Symbols:
    """``num_symbols`` ordinary ids, spread evenly over the vocabulary, half of them keys and half values.

    Args:
        separators: ids of the marks (``equals``, ``end``, ``ask``, ``blank``). Empty: byte pieces of control
            characters, which text hardly has; a tokenizer without byte pieces gives its last ordinary ids, which are
            its rarest.

    Raises UserError if the vocabulary has too few ordinary tokens, or no such id.
    """
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    ordinary = [i for i, piece in enumerate(pieces) if piece and not _SPECIAL.fullmatch(piece)]
    ordinary = [i for i in ordinary if i not in (tokenizer.eod_id, tokenizer.bos_id)]
    if separators:
        wrong = [i for i in separators if not 0 <= i < tokenizer.vocab_size or i == tokenizer.eod_id]
        if wrong:
            raise UserError(
                f"evaluation.recall_separators: {wrong} are not ids of {tokenizer.path} "
                f"(0..{tokenizer.vocab_size - 1}, without the end-of-document token)"
            )
        marks = list(separators)
    else:
        control = [i for i, piece in enumerate(pieces) if _BYTE.fullmatch(piece) and 0 < int(piece[3:5], 16) < 9]
        marks = control[:NUM_MARKS] if len(control) >= NUM_MARKS else ordinary[-NUM_MARKS:]
    ordinary = [i for i in ordinary if i not in marks]
    if num_symbols > len(ordinary) or num_symbols < 2:
        raise UserError(
            f"evaluation.recall_symbols={num_symbols}: {tokenizer.path} has {len(ordinary)} ordinary tokens; give an "
            f"even number from 2 to {len(ordinary)}"
        )
    places = np.linspace(0, len(ordinary) - 1, num_symbols).round().astype(np.int64)
    chosen = np.array(ordinary, dtype=np.int64)[places]
    equals, end, ask, blank = marks
    return Symbols(chosen[0::2], chosen[1::2], equals, end, ask, blank, tokenizer.eod_id)
