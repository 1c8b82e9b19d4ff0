"""The training loop. It knows steps, phases and callbacks, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from hymba_train.callbacks.base import Callback
from hymba_train.data.batches import MicroBatch
from hymba_train.train.metrics import StepMetrics, ThroughputMeter
from hymba_train.train.state import TrainState
from hymba_train.train.step import StepResult


@dataclass(frozen=True)
class PlannedStep:
    """What the next optimizer step trains on."""

    phase: int  # index
    phase_name: str
    first_sample: int  # global sample number within the phase
    batch_size: int  # sequences over all ranks
    micro_batch_size: int
    seq_length: int  # text tokens
    lr: float
    flops_per_token: float  # of the model as it is defined: the meta prefix in every sequence
    executed_flops_per_token: float | None = None  # the meta prefix once a micro-batch; None: as many

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_length


class Steps(Protocol):
    """The order of a run: a pure function of its state."""

    def next(self, state: TrainState) -> PlannedStep | None:
        """The step after ``state``; None when every phase has been trained."""


class Loop:
    """Trains from ``state`` until the plan ends, ``train_steps`` are done, or a callback asks for a stop.

    Args:
        state: where the run stands; the loop moves it on.
        steps: what comes next.
        load: micro-batches of a planned step, of this rank.
        train: one optimizer step on them; the second argument are requests, which come back summed over all ranks.
        start_phase: called with the planned step before the first step of a phase (in this process).
        batch_hash: hash of a step's tokens for the log; None: none.
        train_steps: stop after this step of the run.
        go_back: load the newest checkpoint and set ``state`` to it; false if there is none.
        max_lost: more steps in a row than this that were lost end the run.
        ask: numbers of this rank, asked for in every step; they travel with it to the other ranks, and come back summed
            over all of them as ``answers``.
    """

    def __init__(
        self, state: TrainState, steps: Steps, callbacks: list[Callback], meter: ThroughputMeter, *,
        load: Callable[[PlannedStep], list[MicroBatch]],
        train: Callable[[PlannedStep, list[MicroBatch], tuple[int, ...]], StepResult],
        start_phase: Callable[[PlannedStep], None] = lambda step: None,
        batch_hash: Callable[[PlannedStep], str] | None = None, log_interval: int = 1, train_steps: int | None = None,
        go_back: Callable[[], bool] = lambda: False, ask: Callable[[], tuple[int, ...]] = lambda: (),
        max_lost: int = 10,
    ) -> None:  # fmt: skip
        self.state, self.steps, self.callbacks, self.meter = state, steps, callbacks, meter
        self._load, self._train, self._start_phase, self._batch_hash = load, train, start_phase, batch_hash
        self.log_interval, self.train_steps = log_interval, train_steps
        self._go_back, self._ask, self._max_lost = go_back, ask, max_lost
        self.answers: tuple[int, ...] = ()
        self.stop_reason = ""
        self.failed = False  # the run ended before its end, and starting it again would end the same way
        self.suspect = False  # it did so because the weights may be wrong: nothing is to be saved of them
        self._lost_in_a_row = 0
        self._wants_stop: str | None = None
        self._first_step = state.step

    # -- for callbacks ---------------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        """End training. May be called on any rank, at any time, from a signal handler too: all ranks stop together
        after the step in which they have told each other, and a last checkpoint is written."""
        self._wants_stop = reason

    @property
    def trained(self) -> bool:
        """Whether this process has done a step."""
        return self.state.step > self._first_step

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train; false after an early stop, and of a run that has failed."""
        return self._is_over() and not self.failed

    def emit(self, event: str, *args: object) -> None:
        """Call one hook of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train; returns the final state. Exceptions are shown to all callbacks and raised on."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.close)
            try:
                self.emit("on_train_start")
                self._run_steps()
                self.emit("on_train_end")
            except BaseException as error:
                self.emit("on_exception", error)
                raise
        return self.state

    def _run_steps(self) -> None:
        phase = None
        self.meter.restart()
        for step in self._planned():
            if step.phase != phase:
                phase = step.phase
                if phase != self.state.phase:
                    self.state.start_phase(phase)
                self._start_phase(step)
                self.emit("on_phase_start", step.phase_name)
            self.emit("on_step_start")
            result = self._one_step(step)
            self.meter.pause()
            if result.event is not None:
                self.emit("on_guard", result.event)
            if result.action == "rewind" and self._go_back():
                self.emit("on_rewind")
                phase = None
                self.meter.restart()
                self.meter.resume()
                continue
            if result.action in ("rewind", "stop"):
                self.failed, self.suspect = True, result.suspect
                self.stop_reason = result.reason + (
                    "; no checkpoint to go back to" if result.action == "rewind" else ""
                )
                break
            self._count(step, result)
            logged = bool(self.stop_reason) or self._is_over() or self.state.step % self.log_interval == 0
            metrics = self._metrics(step, result, logged)
            if logged:
                self.emit("on_log", metrics)
                self.meter.restart()
            self.emit("on_step_end", metrics)
            self.meter.resume()

    def _planned(self) -> Iterator[PlannedStep]:
        """Steps to train, until something ends the run; says what in ``stop_reason``."""
        while not self.stop_reason and not self._is_over():
            step = self.steps.next(self.state)
            assert step is not None
            yield step
        if not self.stop_reason:
            reached = self.train_steps is not None and self.state.step >= self.train_steps
            self.stop_reason = "run.train_steps reached" if reached else "all phases trained"

    def _is_over(self) -> bool:
        enough = self.train_steps is not None and self.state.step >= self.train_steps
        return enough or self.steps.next(self.state) is None

    def _one_step(self, step: PlannedStep) -> StepResult:
        batches = self._load(step)
        self.emit("on_batch_loaded")
        return self._train(step, batches, (int(self._wants_stop is not None), *self._ask()))

    def _count(self, step: PlannedStep, result: StepResult) -> None:
        self.state.advance(step.batch_size, step.seq_length)
        self.meter.count(step.tokens, step.flops_per_token, step.executed_flops_per_token)
        stop, *answers = result.requests
        self.answers = tuple(answers)
        if stop:
            self.stop_reason = self._wants_stop or "another rank asked to stop"
        self._end_if_lost(result)

    def _end_if_lost(self, result: StepResult) -> None:
        """A run in which nothing is trained any more has failed, and does not come to its end."""
        self._lost_in_a_row = self._lost_in_a_row + 1 if result.action == "lost" else 0
        all_lost = self._lost_in_a_row == self.state.step - self._first_step
        if self._lost_in_a_row > self._max_lost or (all_lost and self._is_over()):
            self.failed = self.suspect = True
            self.stop_reason = f"the last {self._lost_in_a_row} steps were not applied: {result.reason}"

    def _metrics(self, step: PlannedStep, result: StepResult, logged: bool) -> StepMetrics:
        return StepMetrics(
            step=self.state.step, phase=step.phase_name, loss=result.loss, grad_norm=result.grad_norm, lr=step.lr,
            tokens=self.state.tokens, labelled_tokens=result.num_labelled_tokens, batch_size=step.batch_size,
            seq_length=step.seq_length, rank_seconds=result.rank_seconds, **self.meter.read(), objective=result.metrics,
            batch_hash=self._batch_hash(step) if logged and self._batch_hash else None,
        )  # fmt: skip
