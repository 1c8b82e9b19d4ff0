"""Which source a global sample number reads, and which of the source's samples.

The order is cut into blocks. At the border after N samples source i has given C_i(N) samples: its exact share w_i * N
rounded by largest remainder, so no source is ever a whole sample away from its share, however long the run. Inside a
block the sources are shuffled; each source's own samples come in their order. Everything follows from (seed, phase,
weights, n): any sample can be asked for first, and no index is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np

from hymba_train.data.permutation import Permutation
from hymba_train.errors import UserError

MIN_BLOCK_SAMPLES = 128
MAX_BLOCK_SAMPLES = 2**20


class Blend:
    """Order of the sources in one phase.

    Args:
        weights: source name -> weight, any positive scale (weights are normalised; zero leaves a source out). The
            order in which the names are written does not matter.
        seed: seed of the run.
        phase: name of the phase.

    Raises UserError for weights that are negative or not finite, no positive weight, or a share below 2**-20.
    """

    def __init__(self, weights: Mapping[str, float], seed: int, phase: str) -> None:
        where = f"data.phases.{phase}.blend"
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"{where}.{name} = {weight}: a weight is a finite number >= 0")
        # repr: 0.3 is meant as 3/10, not as the nearest binary fraction.
        exact = {name: Fraction(repr(weight)) for name, weight in sorted(weights.items()) if weight > 0}
        if not exact:
            raise UserError(f"{where} has no source with a positive weight")
        self.seed, self.phase = seed, phase
        self.names = tuple(exact)
        total = sum(exact.values())
        self.shares = tuple(weight / total for weight in exact.values())
        smallest = min(self.shares)
        if smallest * MAX_BLOCK_SAMPLES < 1:
            name = self.names[self.shares.index(smallest)]
            raise UserError(f"{where}.{name} is a share of {float(smallest):.3g}, below 2**-20: leave the source out")
        # A share of at least one sample a block keeps C_i from ever stepping back (see counts_before).
        self.block_samples = MIN_BLOCK_SAMPLES
        while smallest * self.block_samples < 1:
            self.block_samples *= 2
        self._block = lru_cache(maxsize=8)(self._make_block)

    def _border_counts(self, num_samples: int) -> np.ndarray:
        """C_i(num_samples), int64 [sources]: exact shares, rounded by largest remainder (ties: by name)."""
        targets = [share * num_samples for share in self.shares]
        counts = [math.floor(target) for target in targets]
        remainders = [target - count for target, count in zip(targets, counts, strict=True)]
        by_remainder = sorted(range(len(counts)), key=lambda i: -remainders[i])
        for i in by_remainder[: num_samples - sum(counts)]:
            counts[i] += 1
        return np.array(counts, dtype=np.int64)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source number, sample number inside the source), int64 [block_samples] each."""
        before = self._border_counts(block * self.block_samples)
        after = self._border_counts((block + 1) * self.block_samples)
        order = Permutation(self.block_samples, "blend", self.seed, self.phase, block).array()
        sources = np.repeat(np.arange(len(self.names)), after - before)[order]
        samples = np.empty_like(sources)
        for i in range(len(self.names)):
            places = np.flatnonzero(sources == i)
            samples[places] = before[i] + np.arange(places.size)
        return sources, samples

    def __getitem__(self, n: int) -> tuple[str, int]:
        """(source name, number k of the sample within that source) of global sample number n >= 0."""
        if n < 0:
            raise IndexError(f"sample number {n} is negative")
        block, place = divmod(n, self.block_samples)
        sources, samples = self._block(block)
        return self.names[sources[place]], int(samples[place])

    def counts_before(self, n: int) -> dict[str, int]:
        """Samples of each source among global sample numbers 0..n-1."""
        block, place = divmod(n, self.block_samples)
        counts = self._border_counts(block * self.block_samples)
        if place:
            counts += np.bincount(self._block(block)[0][:place], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


class WholeEpochs:
    """Order of the sources in a phase of whole epochs: every sample of every source once before any comes twice.

    The interface is :class:`Blend`'s.

    Args:
        sizes: source name -> its samples, at least one.
        seed, phase: as there.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int, phase: str) -> None:
        self.names = tuple(sorted(sizes))
        self._sizes = np.array([sizes[name] for name in self.names], dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self.epoch_samples = int(self._ends[-1])
        self.shares = tuple(Fraction(sizes[name], self.epoch_samples) for name in self.names)
        self._order = lru_cache(maxsize=8)(lambda epoch: Permutation(self.epoch_samples, "epochs", seed, phase, epoch))

    def __getitem__(self, n: int) -> tuple[str, int]:
        """(source name, number k of the sample within that source) of global sample number n >= 0."""
        if n < 0:
            raise IndexError(f"sample number {n} is negative")
        epoch, place = divmod(n, self.epoch_samples)
        number = self._order(epoch)[place]
        i = int(np.searchsorted(self._ends, number, side="right"))
        return self.names[i], int(epoch * self._sizes[i] + number - (self._ends[i] - self._sizes[i]))

    def counts_before(self, n: int) -> dict[str, int]:
        """Samples of each source among global sample numbers 0..n-1."""
        epoch, place = divmod(n, self.epoch_samples)
        counts = epoch * self._sizes
        if place:
            begun = np.searchsorted(self._ends, self._order(epoch).array()[:place], side="right")
            counts = counts + np.bincount(begun, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))
