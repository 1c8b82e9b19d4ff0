"""A forked process that does one piece of work and says how it went."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable

from hymba_train.checkpoint.children import children_die_with_us

_MOST_BYTES = 4000  # of a report: fits a pipe, so that writing it never blocks
_NICE = 5  # training comes first


class Background:
    """``work`` runs in a fork of this process, on the memory as it is now. It must not touch CUDA or other ranks.

    The fork ignores the signals that ask a training to stop (the work is what they should wait for) and is killed when
    the process that made it dies. Raises OSError if the machine has no room for a process.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._reader, writer = os.pipe()
        self._outcome: str | None = None
        try:
            with children_die_with_us():
                self.pid = os.fork()
        except OSError:
            os.close(self._reader)
            os.close(writer)
            raise
        if self.pid == 0:
            _run(work, writer)
        os.close(writer)

    def outcome(self) -> str | None:
        """None while it runs; "" when the work is done; else what went wrong, in one line."""
        if self._outcome is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._outcome = self._end(os.waitstatus_to_exitcode(status))
        return self._outcome

    def kill(self) -> None:
        """End it now. Its outcome is kept if it had one."""
        if self.outcome() is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._outcome = self._end(-signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within that time."""
        deadline = time.monotonic() + seconds
        while self.outcome() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.outcome() is not None

    def _end(self, code: int) -> str:
        with os.fdopen(self._reader, "rb") as reader:
            said = reader.read().decode(errors="replace")
        if code == 0:
            return ""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return said or f"its writing process died ({how})"


def _run(work: Callable[[], object], writer: int) -> None:
    """In the fork: never returns."""
    code = 1
    try:
        gc.disable()  # a finalizer could touch CUDA
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        os.nice(_NICE)
        work()
        code = 0
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        os.write(writer, text.encode()[:_MOST_BYTES])
    finally:
        os._exit(code)
