"""Timing of prefill and decoding, within a time budget and with batches that fit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hymba_train.analyze.runners import CAPTURE_STEPS

WARM_UP_STEPS = 4


@dataclass
class Prefill:
    """Prompts of ``length`` tokens, ``rows`` at a time."""

    model: str
    length: int
    rows: int
    seconds: float
    tokens_per_second: float


@dataclass
class Decode:
    """Steps over caches of ``length`` tokens. ``cache_bytes``: of one sequence."""

    model: str
    length: int
    wanted_batch: int
    batch: int
    step: str
    tokens_per_second: float
    milliseconds: float
    cache_bytes: int


@dataclass
class Measured:
    """Everything that was timed, and why the rest was not."""

    prefill: list[Prefill] = field(default_factory=list)
    decode: list[Decode] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def measure(
    runners: dict[str, Any], lengths: Sequence[int], batches: Sequence[int], *, steps: int, prefill_rows: int,
    seconds: float, graphs: bool,
) -> Measured:  # fmt: skip
    """All figures that can be begun within ``seconds``; what cannot, and what fails, is in ``left_out``.

    The captured steps of all models come before the eager ones, so that a tight budget leaves both models with some.
    """
    found, started = Measured(), time.perf_counter()

    def due(what: str) -> bool:
        late = time.perf_counter() - started > seconds
        if late:
            found.left_out.append(f"{what}: the time budget of {seconds:g} s was used up")
        return not late

    kinds = ["graph", "eager"] if graphs else ["eager"]
    if not graphs:
        found.left_out.append("captured steps: there is no GPU")
    for length in lengths:
        for batch in batches:
            for kind in kinds:
                for name, runner in runners.items():
                    what = f"{name}, {length} tokens, batch {batch}, {kind} steps"
                    if due(what):
                        _decode(found, what, name, runner, length, batch, kind, steps)
        for name, runner in runners.items():
            what = f"{name}, prefill of {length} tokens"
            if due(what):
                _prefill(found, what, name, runner, length, prefill_rows)
    return found


def _decode(found: Measured, what: str, name: str, runner: Any, length: int, batch: int, kind: str, steps: int) -> None:
    capacity = length + WARM_UP_STEPS + steps + (CAPTURE_STEPS if kind == "graph" else 0) + 1

    def attempt(size: int) -> Decode:
        cache = runner.filled(size, length, capacity)
        num_bytes = runner.sequence_bytes(cache, size)
        step = runner.step(cache, size, length, capacity, kind == "graph")
        token = torch.full((size, 1), 5, device=runner.model.device)
        for _ in range(WARM_UP_STEPS):
            token = step(token)
        _synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            token = step(token)
        _synchronize()
        each = (time.perf_counter() - begun) / steps
        return Decode(name, length, batch, size, kind, size / each, each * 1e3, num_bytes)

    row = halved(attempt, batch, what, found.left_out)
    if row is not None:
        found.decode.append(row)
        print(f"{what}: {row.tokens_per_second:,.0f} tokens/s at batch {row.batch}", flush=True)


def _prefill(found: Measured, what: str, name: str, runner: Any, length: int, rows: int) -> None:
    def attempt(size: int) -> Prefill:
        ids = torch.randint(3, runner.model.config.vocab_size, (size, length), device=runner.model.device)
        for _ in range(2):  # the first one compiles
            _synchronize()
            begun = time.perf_counter()
            runner.prefill(ids, length + 1)
            _synchronize()
            taken = time.perf_counter() - begun
        return Prefill(name, length, size, taken, size * length / taken)

    row = halved(attempt, rows, what, found.left_out)
    if row is not None:
        found.prefill.append(row)
        print(f"{what}: {row.tokens_per_second:,.0f} tokens/s with {row.rows} rows", flush=True)


def halved(attempt: Callable[[int], Any], batch: int, what: str, left_out: list[str]) -> Any | None:
    """``attempt(batch)``, with half the batch while memory runs out. None, and a reason, where nothing helps."""
    while batch >= 1:
        _free()
        try:
            return attempt(batch)
        except torch.OutOfMemoryError:
            pass  # out of the handler the exception, and with it the tensors of its frames, is let go
        except RuntimeError as error:  # a library whose step cannot be captured, say: the rest is still worth having
            left_out.append(f"{what}: {' '.join(str(error).split())[:200]}")
            return None
        batch //= 2
    left_out.append(f"{what}: out of memory with a single sequence")
    return None


def _free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(found: Measured, hymba: str) -> list[dict[str, Any]]:
    """Hymba over each other model, from the fastest row of each at a length and a kind of step."""
    rows = []
    best: dict[tuple[str, int, str], Decode] = {}
    for row in found.decode:
        key = (row.model, row.length, row.step)
        if key not in best or row.tokens_per_second > best[key].tokens_per_second:
            best[key] = row
    for (model, length, step), other in best.items():
        own = best.get((hymba, length, step))
        if model != hymba and own is not None:
            rows.append(
                {"over": model, "length": length, "step": step, "batch": own.batch, "other_batch": other.batch,
                 "speed": own.tokens_per_second / other.tokens_per_second, "cache": other.cache_bytes / own.cache_bytes}
            )  # fmt: skip
    return rows
