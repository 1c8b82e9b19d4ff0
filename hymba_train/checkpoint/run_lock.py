"""One training at a time in a run directory.

Rank 0 holds an flock on ``<run>/run.lock``, in which it has written who it is. The kernel lets go of it when the
process dies, however it dies, so there is no stale lock to remove: the next start takes over. The file stays. On a file
system that is mounted without cluster-wide flock (Lustre's ``localflock``) only trainings of one machine see each
other. Free of torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from hymba_train.errors import UserError
from hymba_train.files import make_private

LOCK_FILE = "run.lock"
PATIENCE_SECONDS = 3.0  # a process that was told to end may take a moment
_CLOSED = -1  # no file's descriptor


class RunLock:
    """Held from construction until :meth:`release` or the end of the process, not beyond it by a forked child.

    Raises UserError naming the owner if another process holds it for ``patience_seconds``.
    """

    def __init__(self, run_directory: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        make_private(run_directory)
        self.path = run_directory / LOCK_FILE
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._acquire(time.monotonic() + patience_seconds)
            self._sign()
        except BaseException:
            self.release()
            raise
        # A writer that was forked for a checkpoint must not keep the lock of a training that was killed.
        os.register_at_fork(after_in_child=self.release)

    def _acquire(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(f"{self.path}: this file system has no flock ({error.strerror})") from error
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path}: another training writes into this run directory ({self._owner()}); wait for it, "
                    "stop it, or start under another run.name"
                )
            time.sleep(0.1)

    def _owner(self) -> str:
        try:
            owner = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"host {owner['host']}, pid {owner['pid']}, job {owner['job']}, since {owner['since']}"
        except (ValueError, KeyError, TypeError):
            return "owner unknown"

    def _sign(self) -> None:
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "none"
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": since}) + "\n"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Let another training in."""
        if self._descriptor != _CLOSED:
            descriptor, self._descriptor = self._descriptor, _CLOSED
            os.close(descriptor)
