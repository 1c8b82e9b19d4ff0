"""When checkpoints are written, and which are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hymba_train.callbacks.base import Callback
from hymba_train.checkpoint import directory


class Writer(Protocol):
    """:class:`hymba_train.checkpoint.save.CheckpointWriter`."""

    root: Path

    def save(self, state: dict[str, int], wait: bool = False) -> None: ...
    def poll(self, wait: bool = False) -> list[Path]: ...


class Checkpointing(Callback):
    """Saves every ``interval`` steps (0: never), on request, and at the end; then deletes what no rule keeps.

    Runs on every rank; ``is_first_rank`` deletes. A checkpoint is reported, and older ones are deleted, only once it
    is published.
    """

    def __init__(self, writer: Writer, interval: int, keep_last: int, keep_every: int, is_first_rank: bool) -> None:
        self.writer, self.interval = writer, interval
        self.keep_last, self.keep_every, self.is_first_rank = keep_last, keep_every, is_first_rank
        self._saved_at: int | None = None

    def on_train_start(self, loop) -> None:
        self._saved_at = loop.state.step  # loaded from there, or nothing trained yet

    on_rewind = on_train_start

    def on_step_end(self, loop, metrics) -> None:
        self._report(loop, self.writer.poll())
        due = self.interval and loop.state.step % self.interval == 0
        if due or loop.save_requested:
            self._save(loop, wait=False)

    def on_train_end(self, loop) -> None:
        if loop.state.step != self._saved_at:
            self._save(loop, wait=True)
        self._report(loop, self.writer.poll(wait=True))

    def _save(self, loop, wait: bool) -> None:
        self._saved_at = loop.state.step
        self.writer.save(loop.state.to_dict(), wait)
        self._report(loop, self.writer.poll())

    def _report(self, loop, published: list[Path]) -> None:
        for path in published:
            if self.is_first_rank:
                directory.prune(self.writer.root, self.keep_last, self.keep_every)
            loop.emit("on_checkpoint_saved", path, directory.step_of(path))
