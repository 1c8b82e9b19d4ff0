"""Why a step came out bad: by running it again, on other data, and on parts of its batch. Free of torch.

transient   the very same step, run again, is good: a fault of the machine
data        good data is good, this batch is bad again; leaving out the culprits makes it good
persistent  what was good before is bad now, too: the weights, the program, or a machine that errs every time

Every run is a whole step, forward and backward, without an update. It is done once a bad step: an anomaly costs
2 + 2 log2(micro-batches) steps, a usual step nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Place = tuple[int, int]  # (data-parallel rank, micro-batch of that rank)
MOST_PROBES = 64


@dataclass(frozen=True)
class Diagnosis:
    """``kind``: transient | data | persistent. ``culprits``: micro-batches without which the step is good; empty where
    data is the cause and no few micro-batches are it."""

    kind: str
    culprits: tuple[Place, ...] = ()
    num_runs: int = 0


class OutOfProbes(Exception):
    """The search took too long."""


def diagnose(
    places: list[Place],
    run_again: Callable[[], bool],
    control: Callable[[], bool] | None,
    without: Callable[[frozenset[Place]], bool],
) -> Diagnosis:
    """Find out why a step is bad. All functions return whether what they ran is good, the same on every rank.

    Args:
        places: all micro-batches of the step.
        run_again: the very same step.
        control: a batch that was good before; None: there is none.
        without: the step with the data of some micro-batches left out; never called with all of them.
    """
    if run_again():
        return Diagnosis("transient", num_runs=1)
    if control is not None and not control():
        return Diagnosis("persistent", num_runs=2)
    search = _Search(without)
    try:
        culprits = search.find(places, frozenset())
        if len(places) > 1 and (len(culprits) == len(places) or not search.good_without(frozenset(culprits))):
            culprits = []
    except OutOfProbes:
        culprits = []
    runs = search.num_runs + (1 if control is None else 2)
    if control is None and (not culprits or len(culprits) == len(places)):
        return Diagnosis("persistent", num_runs=runs)  # nothing was seen to be good
    return Diagnosis("data", tuple(sorted(culprits)), runs)


class _Search:
    def __init__(self, without: Callable[[frozenset[Place]], bool]) -> None:
        self._without = without
        self._known: dict[frozenset[Place], bool] = {}
        self.num_runs = 0

    def good_without(self, removed: frozenset[Place]) -> bool:
        if removed not in self._known:
            if self.num_runs == MOST_PROBES:
                raise OutOfProbes
            self.num_runs += 1
            self._known[removed] = self._without(removed)
        return self._known[removed]

    def find(self, among: list[Place], removed: frozenset[Place]) -> list[Place]:
        """Few members of ``among`` without which the step is good, given that without ``removed`` it is bad and
        without ``removed`` and all of ``among`` it is good, or nothing."""
        if len(among) == 1:
            return among
        half = len(among) // 2
        first, second = among[:half], among[half:]
        if self.good_without(removed | frozenset(first)):
            return self.find(first, removed)
        if self.good_without(removed | frozenset(second)):
            return self.find(second, removed)
        # Culprits in both: each half is searched with the other one out of the way.
        in_first = self.find(first, removed | frozenset(second))
        return in_first + self.find(second, removed | frozenset(in_first))
