"""Synthetic recall tasks as token ids: what was said before must be said again.

Four kinds, after their usual definitions:

``mqar``            multi-query associative recall (Zoology, arXiv:2312.04927): n key-value pairs, then every key once
                    more, at places whose distances follow a power law; its value is to be foretold.
``phonebook``       key-value retrieval: a list of entries with keys of two tokens and values of four, then questions.
``needle``          a needle in a haystack: one sentence over and over, with n entries in it, of which one, at a given
                    depth, is asked for at the end.
``selective_copy``  selective copying (Mamba, arXiv:2312.00752): n tokens between blanks are to be said in order.

A sample is a whole document, the end-of-document token included, and a function of (stream, seed, kind, length, items,
index). Training and evaluation take different streams. Free of torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hymba_train.config.recall_kinds import (
    ENTRY_TOKENS,
    KEY_TOKENS,
    QUESTION_TOKENS,
    SENTENCE_TOKENS,
    VALUE_TOKENS,
)
from hymba_train.evaluation.symbols import ALPHABET, Symbols
from hymba_train.plan.recall import num_questions, shortest

NUM_DEPTHS = 10
TRAINING, EVALUATION = 1, 2
"""Streams of random numbers that never meet."""
GAP_POWER = 0.01
"""Exponent of the distances in mqar, as in its definition: most questions come early."""


@dataclass(frozen=True)
class Sample:
    """One document. ``answers`` holds the number of the answer that a token belongs to, -1 where none is asked for.
    ``known``: tokens that follow from those in front of them, answers and what is said over and over: worth learning.
    """

    tokens: np.ndarray  # int64 [length]
    answers: np.ndarray  # int64 [length]
    known: np.ndarray  # bool [length]
    bucket: int = 0  # needle: which of NUM_DEPTHS depths; else 0


def draw(stream: int, seed: int, kind: str, length: int, items: int, index: int, symbols: Symbols) -> Sample:
    """Sample number ``index`` of a task. ``length`` must hold ``items`` (:func:`hymba_train.plan.recall.shortest`)."""
    assert length >= shortest(kind, items), (kind, length, items)
    entropy = [stream, seed, zlib.crc32(kind.encode()), length, items, index]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    tokens = np.full(length, symbols.blank, dtype=np.int64)
    answers = np.full(length, -1, dtype=np.int64)
    known = np.zeros(length, dtype=bool)
    tokens[-1] = symbols.eod
    bucket = index % NUM_DEPTHS if kind == "needle" else 0
    _DRAW[kind](rng, symbols, items, Sample(tokens[:-1], answers[:-1], known[:-1], bucket))
    return Sample(tokens, answers, known | (answers >= 0), bucket)


def num_buckets(kind: str) -> int:
    return NUM_DEPTHS if kind == "needle" else 1


def _mqar(rng: np.random.Generator, symbols: Symbols, n: int, sample: Sample) -> None:
    keys = rng.choice(symbols.keys, n, replace=False)
    values = rng.choice(symbols.values, n, replace=n > symbols.values.size)
    sample.tokens[0 : 2 * n : 2], sample.tokens[1 : 2 * n : 2] = keys, values
    num_slots = (sample.tokens.size - 2 * n) // 2
    weights = np.arange(1, num_slots + 1) ** (GAP_POWER - 1)
    places = 2 * n + 2 * rng.choice(num_slots, n, replace=False, p=weights / weights.sum())
    sample.tokens[places], sample.tokens[places + 1] = keys, values
    sample.answers[places + 1] = np.arange(n)


def _keys(rng: np.random.Generator, symbols: Symbols, n: int) -> np.ndarray:
    """n different keys, int64 [n, KEY_TOKENS]."""
    size = symbols.keys.size
    numbers = rng.choice(size**KEY_TOKENS, n, replace=False)
    return symbols.keys[np.stack([numbers // size**i % size for i in range(KEY_TOKENS)], axis=1)]


def _values(rng: np.random.Generator, symbols: Symbols, n: int) -> np.ndarray:
    return rng.choice(symbols.values, (n, VALUE_TOKENS))


def _entry(symbols: Symbols, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.concatenate([key, [symbols.equals], value, [symbols.end]])


def _question(symbols: Symbols, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.concatenate([[symbols.ask], key, [symbols.equals], value])


def _phonebook(rng: np.random.Generator, symbols: Symbols, n: int, sample: Sample) -> None:
    keys, values = _keys(rng, symbols, n), _values(rng, symbols, n)
    asked = rng.choice(n, num_questions("phonebook", n), replace=False)
    text = [_entry(symbols, keys[i], values[i]) for i in range(n)]
    text += [_question(symbols, keys[i], values[i]) for i in asked]
    size = sum(part.size for part in text)
    sample.tokens[sample.tokens.size - size :] = np.concatenate(text)  # blanks are in front
    ends = sample.tokens.size - QUESTION_TOKENS * np.arange(asked.size)[::-1]
    for number, end in enumerate(ends):
        sample.answers[end - VALUE_TOKENS : end] = number


def _needle(rng: np.random.Generator, symbols: Symbols, n: int, sample: Sample) -> None:
    keys, values = _keys(rng, symbols, n), _values(rng, symbols, n)
    sentence = rng.choice(np.concatenate([symbols.keys, symbols.values]), SENTENCE_TOKENS)
    size = sample.tokens.size - QUESTION_TOKENS - n * (ENTRY_TOKENS + 1)
    hay = np.resize(sentence, size)
    said_before = np.arange(size) >= SENTENCE_TOKENS
    depths = np.concatenate([[round(sample.bucket * size / (NUM_DEPTHS - 1))], rng.integers(0, size + 1, n - 1)])
    parts, repeats, begin = [], [], 0
    for i in np.argsort(depths, kind="stable"):
        parts += [hay[begin : depths[i]], [symbols.end], _entry(symbols, keys[i], values[i])]
        repeats += [said_before[begin : depths[i]], np.zeros(ENTRY_TOKENS + 1, dtype=bool)]
        begin = depths[i]
    sample.tokens[:] = np.concatenate([*parts, hay[begin:], _question(symbols, keys[0], values[0])])
    sample.known[:] = np.concatenate([*repeats, said_before[begin:], np.zeros(QUESTION_TOKENS, dtype=bool)])
    sample.answers[-VALUE_TOKENS:] = 0


def _selective_copy(rng: np.random.Generator, symbols: Symbols, n: int, sample: Sample) -> None:
    said = rng.choice(symbols.values[:ALPHABET], n)
    context = sample.tokens.size - 1 - n
    sample.tokens[np.sort(rng.choice(context, n, replace=False))] = said
    sample.tokens[context] = symbols.ask
    sample.tokens[-n:] = said
    sample.answers[-n:] = np.arange(n)


_DRAW: dict[str, Callable[[np.random.Generator, Symbols, int, Sample], None]] = {
    "mqar": _mqar, "phonebook": _phonebook, "needle": _needle, "selective_copy": _selective_copy,
}  # fmt: skip
"""Kind -> what writes n items into a blank sample, from which the end-of-document token is left off."""
