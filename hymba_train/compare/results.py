"""What the runs of a comparison have left in their metrics.jsonl, and what follows from it. Free of torch."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hymba_train.callbacks.jsonl import METRICS, counting, read_lines
from hymba_train.compare.study import Run, Study, flops_at, num_parameters
from hymba_train.describe.cache import cache_bytes
from hymba_train.runs.metrics import useful_seconds
from hymba_train.runs.summary import state_of

CACHE_TOKENS = 8192
"""Length of the sequence whose cache is given."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them see :func:`t_95`."""
Z_95 = 1.959964


@dataclass(frozen=True)
class Point:
    """One logged step."""

    step: int
    tokens: int
    flops: float
    seconds: float  # of training steps, from the first one on
    loss: float
    batch_hash: str | None


@dataclass(frozen=True)
class RunResult:
    """One run as far as it has come. Held-out losses and recall are those of its end; empty before it."""

    member: str
    seed: int
    state: str  # finished, stopped (REASON), failed (REASON) ...
    curve: tuple[Point, ...]
    tokens_per_second: float | None  # mean over all training steps
    held_out: dict[str, float]  # domain -> nats per token
    recall: dict[str, float]  # task -> accuracy, 0..1
    recall_loss: dict[str, float]  # task -> nats per answer token

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    @property
    def mean_held_out(self) -> float | None:
        return statistics.fmean(self.held_out.values()) if self.held_out else None

    @property
    def mean_recall(self) -> float | None:
        return statistics.fmean(self.recall.values()) if self.recall else None


@dataclass(frozen=True)
class MemberResult:
    """All seeds of one member, and what its configuration says of it."""

    name: str
    num_parameters: int
    cache_bytes: int  # of one sequence of CACHE_TOKENS: the true bytes, describe.cache
    tokens: int  # of the whole training
    flops: float
    runs: tuple[RunResult, ...]

    @property
    def finished(self) -> list[RunResult]:
        return [run for run in self.runs if run.is_finished]

    def values(self, name: str) -> list[float]:
        """``mean_recall``, ``mean_held_out`` or ``tokens_per_second`` of the finished seeds."""
        return [value for run in self.finished if (value := getattr(run, name)) is not None]


def read_results(study: Study, failures: dict[str, str], now: float) -> list[MemberResult]:
    """Everything that there is; ``failures``: name -> reason of runs that have just failed."""
    return [
        MemberResult(
            member, num_parameters(config := study.config(member)),
            cache_bytes(config.model, CACHE_TOKENS).total_bytes,
            sum(phase.tokens for phase in config.data.phases.values()), flops_at(config, 10**18),
            tuple(read_run(run, failures.get(run.name), now) for run in study.of(member)),
        )
        for member in study.members
    ]  # fmt: skip


def read_run(run: Run, failure: str | None, now: float) -> RunResult:
    """One run by its log. ``failure``: why it has just failed, None if it has not; ``now``: seconds since the epoch."""
    path = run.directory / METRICS
    lines = read_lines(path)
    curve, seconds, before = [], 0.0, 0
    for line in counting(lines, "train"):
        seconds += (line["step"] - before) * line["step_seconds"]
        before = line["step"]
        loss = math.nan if line["loss"] is None else line["loss"]
        curve.append(
            Point(
                line["step"], line["tokens"], flops_at(run.config, line["tokens"]), seconds, loss,
                line.get("batch_hash"),
            )
        )  # fmt: skip
    state = state_of(run.directory, lines, path.stat().st_mtime if lines else 0.0, now)
    if failure is not None:
        state = f"failed ({failure})"
    held_out, tasks = {}, {}
    if state == "finished" and curve:
        held_out = _last(lines, "validation", curve[-1].step).get("loss", {})
        tasks = _last(lines, "recall", curve[-1].step).get("tasks", {})
    spent = useful_seconds(lines)
    return RunResult(
        run.member, run.seed, state, tuple(curve), curve[-1].tokens / spent if curve and spent else None,
        {domain: math.nan if loss is None else loss for domain, loss in held_out.items()},
        {name: found["accuracy"] for name, found in tasks.items()},
        {name: math.nan if found["loss"] is None else found["loss"] for name, found in tasks.items()},
    )  # fmt: skip


def _last(lines: list[dict], event: str, step: int) -> dict:
    """The record of the end of training; {} if the run ended otherwise."""
    found = counting(lines, event)
    return found[-1] if found and found[-1]["step"] == step else {}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float] | None:
    """(mean, sample standard deviation; 0 for one value); None for none."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def t_95(num_values: int) -> float:
    """Two-sided 95 % quantile of Student's t for the mean of two or more values, to three digits behind the point."""
    freedom = num_values - 1
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = Z_95  # Cornish and Fisher's series in 1 / freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Difference:
    """``other`` minus ``reference``, over the seeds that both have finished: pairs that saw the same data."""

    reference: str
    other: str
    measure: str  # mean_recall | mean_held_out
    mean: float
    half_width: float | None  # of the 95 % interval of the mean, by Student's t; None for a single pair
    num_seeds: int

    @property
    def is_resolved(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


def differences(members: Sequence[MemberResult]) -> list[Difference]:
    """Of every member to the first one, and to the one before it."""
    pairs = [(members[0], other) for other in members[1:]]
    pairs += itertools.pairwise(members[1:])
    found = []
    for measure in ("mean_recall", "mean_held_out"):
        for reference, other in pairs:
            by_seed = {run.seed: getattr(run, measure) for run in reference.finished}
            deltas = [
                getattr(run, measure) - by_seed[run.seed]
                for run in other.finished
                if by_seed.get(run.seed) is not None and getattr(run, measure) is not None
            ]
            if (found_deltas := mean_and_spread(deltas)) is None:
                continue
            (mean, spread), n = found_deltas, len(deltas)
            half = None if n < 2 else t_95(n) * spread / math.sqrt(n)
            found.append(Difference(reference.name, other.name, measure, mean, half, n))
    return found


@dataclass(frozen=True)
class DataCheck:
    """Whether the members saw equal batches in equal order, step by step, from the hashes in their logs."""

    num_compared: int  # hashes that were held to another member's
    problems: tuple[str, ...]


def check_data(members: Sequence[MemberResult]) -> DataCheck:
    """Compare batch hashes between the members, seed by seed."""
    compared, problems = 0, []
    for seed in sorted({run.seed for member in members for run in member.runs}):
        first: dict[int, tuple[str, str]] = {}
        for member in members:
            for run in member.runs:
                if run.seed != seed:
                    continue
                for point in run.curve:
                    if point.batch_hash is None:
                        continue
                    owner, expected = first.setdefault(point.step, (member.name, point.batch_hash))
                    if owner == member.name:
                        continue
                    compared += 1
                    if point.batch_hash != expected:
                        problems.append(
                            f"seed {seed}: {owner} and {member.name} trained on different batches in step {point.step}"
                        )
                        break
    return DataCheck(compared, tuple(problems))
