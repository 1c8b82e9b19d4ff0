"""Held-out loss by domain, and recall tasks: every so often and at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hymba_train.callbacks.base import Callback


class Evaluation(Callback):
    """Runs ``evaluate`` (collective over all ranks) and hands its result to the hook ``event`` of the other callbacks.

    ``interval`` in steps; 0: only at the end. The same sequences every time and under every layout. ``is_missing``
    (collective, of a step): whether the log lacks the evaluation of a run's end; a process that finds nothing left to
    train makes up for one that died in it.
    """

    def __init__(
        self, evaluate: Callable[[], dict[str, Any]], interval: int, event: str = "on_evaluate_end",
        is_missing: Callable[[int], bool] = lambda step: False,
    ) -> None:  # fmt: skip
        self._evaluate, self.interval, self.event, self._is_missing = evaluate, interval, event, is_missing
        self._done_at: int | None = None

    def on_step_end(self, loop, metrics) -> None:
        if loop.finished:  # on_train_end's, after the last checkpoint
            return
        if self.interval and loop.state.step % self.interval == 0:
            self._run(loop)

    def on_train_end(self, loop) -> None:
        # Not after an early stop: whoever asked for it may not wait.
        if loop.state.step == self._done_at or not loop.finished:
            return
        if loop.trained or self._is_missing(loop.state.step):
            self._run(loop)

    def _run(self, loop) -> None:
        self._done_at = loop.state.step
        loop.emit(self.event, self._evaluate())
