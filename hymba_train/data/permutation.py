"""Random access to a shuffled order that is never stored.

A :class:`Permutation` maps position i to element p(i) of 0..size-1 by arithmetic: a keyed Feistel network (Luby and
Rackoff, "How to construct pseudorandom permutations", 1988) on the smallest power of two that holds the range, walked
until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). So a shuffle of any number of
samples costs no memory, needs no index file, and depends on its key alone: not on the version of numpy's generators,
on the number of ranks or on what was read before.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TypeVar

import numpy as np

NUM_ROUNDS = 8
_MASK = 2**64 - 1
_Positions = TypeVar("_Positions", int, np.ndarray)


def _mix(x: _Positions) -> _Positions:
    """Finaliser of SplitMix64, on a Python int or an array of uint64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Permutation:
    """Keyed bijection of 0..size-1.

    Args:
        size: number of elements, 1..2**62.
        key: any mixture of str and int; equal keys and sizes give equal permutations, on every machine.
    """

    def __init__(self, size: int, *key: str | int) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"a permutation has 1 to 2**62 elements, not {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._right_bits = bits - bits // 2
        self._right_mask = 2**self._right_bits - 1
        self._left_mask = 2 ** (bits // 2) - 1
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * NUM_ROUNDS).digest()
        self._round_keys = struct.unpack(f"<{NUM_ROUNDS}Q", digest)

    def _encrypt(self, x: _Positions) -> _Positions:
        left, right = x >> self._right_bits, x & self._right_mask
        for i in range(0, NUM_ROUNDS, 2):
            left = left ^ (_mix((right + self._round_keys[i]) & _MASK) & self._left_mask)
            right = right ^ (_mix((left + self._round_keys[i + 1]) & _MASK) & self._right_mask)
        return (left << self._right_bits) | right

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """Element at ``position``. Raises IndexError outside 0..size-1."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside a permutation of {self.size}")
        x = self._encrypt(int(position))
        while x >= self.size:  # below 2 turns on average: the domain is less than twice the range (except sizes 1, 2)
            x = self._encrypt(x)
        return x

    def array(self) -> np.ndarray:
        """The whole permutation, int64 [size]; the same numbers as element by element."""
        x = self._encrypt(np.arange(self.size, dtype=np.uint64))
        while (outside := np.flatnonzero(x >= self.size)).size:
            x[outside] = self._encrypt(x[outside])
        return x.astype(np.int64)
