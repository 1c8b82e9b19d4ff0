"""The guards of a run, as its configuration wants them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hymba_train.callbacks.base import Callback
from hymba_train.config.schema import Config
from hymba_train.data.batches import MicroBatch
from hymba_train.data.dataset import TrainingData
from hymba_train.errors import ReplicasDiffer
from hymba_train.exit_codes import DRIFTED
from hymba_train.guards.drift import DriftGuard
from hymba_train.guards.ledger import Ledger
from hymba_train.guards.numerics import NumericalGuard
from hymba_train.guards.starts import failed_before, too_many_starts
from hymba_train.guards.stragglers import Stragglers
from hymba_train.guards.watchdog import Watchdog
from hymba_train.outcome import write_outcome
from hymba_train.parallel.fp8_state import Fp8State
from hymba_train.parallel.ranks import on_rank_0
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.loop import PlannedStep
from hymba_train.train.state import TrainState
from hymba_train.train.step import Stepper, StepResult


class Guards:
    """Trains guarded steps, and has the callbacks of the other guards, which belong before all others.

    Made by every rank alike, once the model is loaded. ``watchdog``: runs since the start of the process, or None.
    """

    def __init__(
        self, config: Config, directory: Path, runtime: Runtime, models: list, chunks: list, optimizer: Any,
        stepper: Stepper, data: TrainingData, state: TrainState, watchdog: Watchdog | None,
    ) -> None:  # fmt: skip
        c = config.guards
        self._stepper, self._state = stepper, state
        self._fp8 = Fp8State.of(models)
        self._stragglers: Stragglers | None = None
        self._numerics: NumericalGuard | None = None
        if c.numerics:
            ledger = on_rank_0(lambda: Ledger(directory))
            self._numerics = NumericalGuard(c, stepper, data, runtime, state, ledger, self._fp8)
        if self._numerics and watchdog:
            self._numerics.touch = watchdog.touch
        self.callbacks: list[Callback] = [watchdog] if watchdog else []
        if runtime.world_size == 1:
            return
        if c.straggler_ratio is not None:
            self._stragglers = Stragglers(runtime, chunks[0].config, c.straggler_ratio)
            self.callbacks.append(self._stragglers)
        if c.drift_interval:
            save_interval = config.checkpoint.save_interval if config.checkpoint.enabled else 0
            intervals = [interval for interval in (c.drift_interval, save_interval) if interval]
            self.callbacks.append(DriftGuard(runtime, models, chunks, optimizer, intervals))

    def step(self, planned: PlannedStep, batches: list[MicroBatch], requests: tuple[int, ...]) -> StepResult:
        """One optimizer step, or what a guard makes of it."""
        seconds = self._stragglers.seconds if self._stragglers else 0.0
        if self._numerics is None:
            self._fp8.remember()
            result = self._stepper.train(batches, requests, seconds)
            if result.action == "lost":
                self._fp8.go_back()
                return replace(result, event=self._about_lost(planned, result))
            return result
        return self._numerics.step(planned, batches, requests, seconds)

    def _about_lost(self, planned: PlannedStep, result: StepResult) -> dict[str, Any]:
        """For the log: nobody looks for the cause, but a step that was not applied is not passed over in silence."""
        return {
            "guard": "none", "step": self._state.step + 1, "phase": planned.phase_name,
            "first_sample": planned.first_sample, "num_samples": planned.batch_size, "problem": result.reason,
            "loss": result.loss, "grad_norm": result.grad_norm, "action": "skipped",
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of them, as plain data."""
        return self._numerics.judge.to_dict() if self._numerics else None

    def load(self, saved: dict[str, Any] | None) -> None:
        """Take over what :meth:`to_dict` gave."""
        if self._numerics:
            self._numerics.judge.load(saved)


@contextmanager
def watched(config: Config, directory: Path, runtime: Runtime) -> Iterator[Watchdog | None]:
    """The watchdog, from here on to the end; None if guards.hang_seconds is. Replicas that differ end this process
    inside at once, with the exit code that says so."""
    watchdog = None if config.guards.hang_seconds is None else Watchdog(config.guards, directory, runtime)
    try:
        yield watchdog
    except ReplicasDiffer as error:
        print(f"hymba: error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(DRIFTED)
    finally:
        if watchdog:
            watchdog.close()


def refusal_at_start(directory: Path) -> str | None:
    """Why this process should not even begin; the same on every rank."""
    return on_rank_0(lambda: failed_before(directory))


def refusal_from(config: Config, directory: Path, from_step: int) -> str | None:
    """Why another start from ``from_step`` would be in vain; the same on every rank, and left behind as the outcome."""

    def refuse() -> str | None:
        reason = too_many_starts(directory, from_step, config.guards.max_starts_without_progress)
        if reason is not None:
            write_outcome(directory, "failed", from_step, reason)
        return reason

    return on_rank_0(refuse)
