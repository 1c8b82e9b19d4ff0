"""Processes that do not outlive the one they work for.

A rank that is killed while a fork of it writes a checkpoint would leave that fork writing into the directory which the
restarted rank writes anew; ranks whose torchrun is killed would train on with nobody to look after them. Linux only;
elsewhere they live on. Free of torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_parent = 0  # this process's pid inside the context manager


@contextmanager
def children_die_with_us() -> Iterator[None]:
    """Processes forked inside by this thread are killed when it ends, however it does."""
    global _parent
    before, _parent = _parent, os.getpid()
    try:
        yield
    finally:
        _parent = before


def stop_when_parent_dies() -> None:
    """Have SIGTERM sent to this process when the one that started it dies: a training then saves and stops."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def die_with(parent: int) -> None:
    """Have this process killed when ``parent``, which has started it, dies; ends it if that has happened already."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we had asked
            os._exit(1)


def _after_fork() -> None:
    global _parent
    if _parent:
        die_with(_parent)
        _parent = 0  # forks of this fork are its own business


os.register_at_fork(after_in_child=_after_fork)
