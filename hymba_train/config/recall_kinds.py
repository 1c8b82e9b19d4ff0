"""Kinds of synthetic recall tasks: how much fits into a sample. Free of torch and numpy.

:mod:`hymba_train.evaluation.recall` draws them; a kind is known everywhere once it is in :data:`RECALL_KINDS` and has a
drawing there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

KEY_TOKENS, VALUE_TOKENS = 2, 4
"""Tokens of a key and of a value in phonebook and needle; in mqar and selective_copy both are single tokens."""
ENTRY_TOKENS = KEY_TOKENS + VALUE_TOKENS + 2  # key, separator, value, end mark
QUESTION_TOKENS = KEY_TOKENS + VALUE_TOKENS + 2  # question mark, key, separator, value
SENTENCE_TOKENS = 16
"""The haystack of the needle task is one sentence over and over."""


@dataclass(frozen=True)
class RecallKind:
    """Sizes of one kind."""

    questions: Callable[[int], int]  # items -> answers asked for in a sample
    shortest: Callable[[int], int]  # items -> tokens that a sample needs at least, the end-of-document token included
    usual_items: Callable[[int], int]  # length of a sample -> items, where the configuration gives none


def _asked(items: int) -> int:
    return max(1, items // 4)


RECALL_KINDS = {
    "mqar": RecallKind(lambda n: n, lambda n: 4 * n + 1, lambda length: length // 8),
    "phonebook": RecallKind(
        _asked, lambda n: ENTRY_TOKENS * n + QUESTION_TOKENS * _asked(n) + 1, lambda length: length // 16
    ),
    "needle": RecallKind(
        lambda n: 1, lambda n: (ENTRY_TOKENS + 1) * n + QUESTION_TOKENS + 1 + SENTENCE_TOKENS, lambda length: 4
    ),
    "selective_copy": RecallKind(lambda n: n, lambda n: 2 * n + 2, lambda length: 16),
}
"""evaluation.recall.NAME.kind -> its sizes."""
