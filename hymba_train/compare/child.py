"""One run in a process of its own, forked from one that has imported everything already.

The parent imports nothing heavy: it names :func:`train_run`, and Python's fork server does the rest.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

PRELOAD = ("hymba_train.cli", "hymba_train.train.cli", "hymba_train.train.main")
"""Modules that the fork server imports once. None of them may touch a GPU, which forks would inherit broken."""
SERVER = "hymba_train.compare.server"
"""What the fork server imports before anything else."""
CUDA_ERROR_NOT_INITIALIZED = 3  # what the driver answers a fork of a process that uses it


def train_run(resolved: str, log: str, fresh: bool) -> None:
    """``hymba train --frozen RESOLVED`` with its output in ``log``; exits with its code. For a process of its own.

    ``fresh``: in a fresh interpreter. So it is done as well where the fork could not use the GPU.
    """
    from hymba_train.checkpoint.children import stop_when_parent_dies

    stop_when_parent_dies()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent asks runs to stop
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    arguments = ["train", "--frozen", resolved]
    if fresh or _gpu_is_spoilt():
        os.execv(sys.executable, [sys.executable, "-m", "hymba_train", *arguments])
    from hymba_train.cli import main

    code = main(arguments)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the clean-up of a server's fork


def _gpu_is_spoilt() -> bool:
    """Whether the fork server has initialised the CUDA driver, in spite of PRELOAD: its forks can never use it."""
    if "torch" in sys.modules and sys.modules["torch"].cuda._is_in_bad_fork():
        return True
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == CUDA_ERROR_NOT_INITIALIZED
    except OSError:  # no driver, no GPU
        return False


def last_line(log: Path) -> str:
    """What a run said last."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
