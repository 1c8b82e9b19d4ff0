"""Words and numbers for error lines: what the user probably meant, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Known name nearest to ``word``, or None if none is near. A dotted word also matches by its last part alone.

    >>> nearest("lr", ["optim.lr", "optim.min_lr", "model.num_layers"])
    'optim.lr'
    """
    known = list(known)
    same_leaf = [k for k in known if k.rpartition(".")[2] == word.rpartition(".")[2]]
    if same_leaf:
        return max(same_leaf, key=lambda k: difflib.SequenceMatcher(None, word, k).ratio())
    if "." in word:  # a slip in the last part is likelier than one in the group
        group, _, leaf = word.rpartition(".")
        siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
        match = difflib.get_close_matches(leaf, siblings, 1, 0.6)
        if match:
            return siblings[match[0]]
    match = difflib.get_close_matches(word, known, 1, 0.6)
    return match[0] if match else None


def did_you_mean(word: str, known: Iterable[str], what: str = "known") -> str:
    """Tail of an error line: the nearest known name, or all of them when none is near."""
    known = list(known)
    match = nearest(word, known)
    if match is not None:
        return f"did you mean {match}?"
    return f"{what}: {', '.join(known)}" if known else f"{what}: none"


def multiples_around(value: int, base: int) -> str:
    """'nearest are 96 and 120': the multiples of ``base`` on either side of ``value``.

    >>> multiples_around(100, 24)
    'nearest are 96 and 120'
    """
    below, above = value // base * base, (value // base + 1) * base
    return f"nearest is {above}" if below == 0 else f"nearest are {below} and {above}"


def divisors_around(value: int, total: int) -> str:
    """'nearest are 5 and 10': the divisors of ``total`` on either side of ``value``.

    >>> divisors_around(6, 25)
    'nearest are 5 and 25'
    """
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    near = [str(d) for d in (*below[-1:], *above[:1])]
    return f"nearest {'is' if len(near) == 1 else 'are'} {' and '.join(near)}"
