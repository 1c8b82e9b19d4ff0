"""Helper processes of libraries that outlive the rank which started them.

Megatron-Core's saves, in the background or not, report through a queue of multiprocessing's Manager, which is a process
started by ``spawn`` that serves until it is told to stop. A rank that is killed tells it nothing: it stays, and keeps
the rank's output pipes open, for ever. Started here instead, it asks the kernel to end it with its parent (Linux).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """In a process that ``parent`` has started: have the kernel kill it when that thread of the parent ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we had asked
        os._exit(1)


def start_results_queue() -> None:
    """Give Megatron-Core its queue for results of saves. Idempotent; call from the main thread."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=end_with_parent, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()  # keeps the manager alive
