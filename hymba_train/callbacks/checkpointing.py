"""When checkpoints are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hymba_train.callbacks.base import Callback
from hymba_train.checkpoint import directory
from hymba_train.errors import RAISED_BY_ALL

if TYPE_CHECKING:
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics


class Writer(Protocol):
    """:class:`hymba_train.checkpoint.save.CheckpointWriter`."""

    root: Path

    def save(self, state: dict[str, int], wait: bool = False) -> None: ...
    def poll(self, wait: bool = False, sums: Sequence[int] = ()) -> list[Path]: ...
    def finish_alone(self) -> None: ...


class Checkpointing(Callback):
    """Saves every ``interval`` steps (0: never) and at the end, unless the weights are suspect then.

    Runs on every rank. A checkpoint is reported only once it is published.
    """

    def __init__(self, writer: Writer, interval: int) -> None:
        self.writer, self.interval = writer, interval
        self._saved_at: int | None = None

    def on_train_start(self, loop: Loop) -> None:
        self._saved_at = loop.state.step  # loaded from there, or nothing trained yet

    on_rewind = on_train_start

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        self._report(loop, self.writer.poll(sums=loop.answers))
        if loop.stop_reason or loop.finished:  # before the evaluation that ends the run: it may take long
            if not loop.suspect:
                self._save(loop, wait=True)
        elif self.interval and loop.state.step % self.interval == 0:
            self._save(loop, wait=False)

    def on_train_end(self, loop: Loop) -> None:
        if loop.state.step != self._saved_at and not loop.suspect:
            self._save(loop, wait=True)
        self._report(loop, self.writer.poll(wait=True))

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        # What all ranks raise leaves them time for a checkpoint from before the trouble. After anything else a rank may
        # be gone, without whose part it cannot be published.
        if isinstance(error, RAISED_BY_ALL):
            self.writer.finish_alone()

    def _save(self, loop: Loop, wait: bool) -> None:
        self._saved_at = loop.state.step
        # What is still being written is waited for anyway; said before the next one may push it out by retention, while
        # whoever exports it can get hold of it.
        self._report(loop, self.writer.poll(wait=True))
        self.writer.save(loop.state.to_dict(), wait)
        self._report(loop, self.writer.poll())

    def _report(self, loop: Loop, published: list[Path]) -> None:
        for path in published:
            loop.emit("on_checkpoint_saved", path, directory.step_of(path))
