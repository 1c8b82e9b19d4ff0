"""One run in a process of its own, forked from one that has imported everything already.

The parent imports nothing heavy: it names :func:`train_run`, and Python's fork server does the rest.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

PRELOAD = ("hymba_train.cli", "hymba_train.plan", "hymba_train.train.main")
"""Modules that the fork server imports once. None of them may touch a GPU: what forks would inherit it broken."""


def train_run(resolved: str, log: str) -> None:
    """``hymba train --frozen RESOLVED`` with its output in ``log``; exits with its code. Called in a fresh process."""
    from hymba_train.checkpoint.children import stop_when_parent_dies

    stop_when_parent_dies()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent asks runs to stop
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    arguments = ["train", "--frozen", resolved]
    if "torch" in sys.modules and _gpu_was_touched():
        os.execv(sys.executable, [sys.executable, "-m", "hymba_train", *arguments])
    from hymba_train.cli import main

    code = main(arguments)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the clean-up of a server's fork


def _gpu_was_touched() -> bool:
    """Whether CUDA was initialised before the fork, in spite of PRELOAD: then only a fresh interpreter can use it."""
    import torch

    return torch.cuda._is_in_bad_fork()


def last_line(log: Path) -> str:
    """What a run said last."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
