"""Stopping early, in good order: a file or a signal ends training after the current step, on all ranks, with a save.

Whoever wants a run to stop asks for it by a file (:mod:`hymba_train.outcome`), or sends a rank SIGTERM or SIGUSR1.
Rank 0 looks for the file before every step; the ranks agree within the step. A file, because signals to a job under
torchrun end torchrun itself.

An early stop also has its own exit code, 75 (EX_TEMPFAIL): start the run again and it goes on. Free of torch.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.callbacks.base import Callback
from hymba_train.outcome import OUTCOME_FILE, STOP_FILE, first_line, write_outcome

if TYPE_CHECKING:
    from hymba_train.train.loop import Loop

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_BETWEEN_LOOKS = 1.0  # on a shared file system a look costs about a millisecond


class StopOnRequest(Callback):
    """On every rank, after the callback that saves: the outcome is written when the checkpoint is published."""

    def __init__(self, directory: Path, is_first_rank: bool) -> None:
        self.directory, self.is_first_rank = directory, is_first_rank
        self._handlers: dict[int, Any] = {}
        self._next_look = 0.0

    def on_train_start(self, loop: Loop) -> None:
        if self.is_first_rank:
            (self.directory / OUTCOME_FILE).unlink(missing_ok=True)  # of the process before
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
            return

        def handle(number: int, frame: object) -> None:  # only notes it: nothing is safe between two instructions
            loop.request_stop(f"signal {signal.Signals(number).name}")

        for wanted in SIGNALS:
            self._handlers[wanted] = signal.signal(wanted, handle)

    def on_step_start(self, loop: Loop) -> None:
        if not self.is_first_rank or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        # Listed, not asked for by name: NFS remembers for up to a minute that a file is not there.
        if any(entry.name == STOP_FILE for entry in self.directory.iterdir()):
            loop.request_stop(first_line(self.directory / STOP_FILE) or STOP_FILE)

    def on_train_end(self, loop: Loop) -> None:
        if self.is_first_rank:
            word = "failed" if loop.failed else "finished" if loop.finished else "stopped"
            write_outcome(self.directory, word, loop.state.step, loop.stop_reason)
            (self.directory / STOP_FILE).unlink(missing_ok=True)  # done: the next start must not stop at once

    def close(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers.clear()
