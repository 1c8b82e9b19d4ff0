"""When the model in training is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hymba_train.callbacks.base import Callback

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationInTraining
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics


class Evaluation(Callback):
    """Runs ``evaluation`` (collective over all ranks) every so often and at the end, and hands its result to all.

    ``is_missing`` (collective, of a step): whether the log lacks the evaluation of a run's end; a process that finds
    nothing left to train makes up for one that died in it.
    """

    def __init__(
        self, evaluation: EvaluationInTraining, is_missing: Callable[[int], bool] = lambda step: False
    ) -> None:
        self.evaluation, self._is_missing = evaluation, is_missing
        self._done_at: int | None = None

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        if loop.finished:  # on_train_end's, after the last checkpoint
            return
        interval = self.evaluation.interval
        if interval and loop.state.step % interval == 0:
            self._run(loop)

    def on_train_end(self, loop: Loop) -> None:
        # Not after an early stop: whoever asked for it may not wait.
        if loop.state.step == self._done_at or not loop.finished:
            return
        if loop.trained or self._is_missing(loop.state.step):
            self._run(loop)

    def _run(self, loop: Loop) -> None:
        self._done_at = loop.state.step
        loop.emit("on_evaluation_end", self.evaluation.run())
