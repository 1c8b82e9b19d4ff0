"""The interface by which the loop knows everything that is not training: logging, evaluation, checkpoints, guards.

Rules for a callback: hooks run on every rank in the order of the list, and a hook that talks to other ranks must do so
on all of them. A logging callback must never stop training. State that must survive a restart belongs into
``TrainState``, not into a callback.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationResult
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics


class Callback:
    """Does nothing; override what is needed. ``loop`` gives ``state`` and ``request_stop()``."""

    def on_train_start(self, loop: Loop) -> None:
        """Before the first step of this process, after a checkpoint has been loaded."""

    def on_phase_start(self, loop: Loop, phase: str) -> None:
        """Before the first step in a phase, and once at the start of every process for the phase it continues."""

    def on_step_start(self, loop: Loop) -> None:
        """Before an optimizer step. ``loop.state.step`` steps are done."""

    def on_batch_loaded(self, loop: Loop) -> None:
        """Within a step: its micro-batches are there, and computing begins."""

    def on_guard(self, loop: Loop, event: dict) -> None:
        """A guard has noticed something; ``event`` is plain data for logs (``guard``, ``step`` and what it knows)."""

    def on_rewind(self, loop: Loop) -> None:
        """The run went back: ``loop.state`` is that of the checkpoint which has been loaded."""

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        """After every optimizer step; ``loop.state`` counts it already."""

    def on_log(self, loop: Loop, metrics: StepMetrics) -> None:
        """After the steps that are logged: each logging.log_interval-th, and the last one."""

    def on_evaluation_end(self, loop: Loop, result: EvaluationResult) -> None:
        """After an evaluation of the model as it is now."""

    def on_checkpoint_saved(self, loop: Loop, path: Path, step: int) -> None:
        """After a checkpoint of ``step`` has been published; with an asynchronous save that is some steps later."""

    def on_train_end(self, loop: Loop) -> None:
        """After the last step of this process, whatever ended it except an exception."""

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        """Training raised ``error``, which is raised on after all callbacks have seen it."""

    def close(self) -> None:
        """Last call, always made: release files and processes."""
