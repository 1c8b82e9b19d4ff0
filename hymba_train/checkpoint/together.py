"""Work on a step directory that ranks do together, or that one does for all: everybody gets the result or the error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hymba_train.checkpoint import manifest
from hymba_train.checkpoint.run_lock import RunLock
from hymba_train.errors import UserError


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What ``work`` returns on rank 0, on every rank. UserError and OSError are raised on every rank."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [work()]
        except (UserError, OSError) as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError | OSError):
        raise answer[0]
    return answer[0]


def alike(work: Callable[[], Any]) -> Any:
    """What ``work``, which talks to no other rank, returns here. A UserError on any rank is raised on every rank, which
    would else wait for the one that has it in their next collective. It names that rank, unless it is 0, and is for
    rank 0 to print.
    """
    result, mine = None, None
    try:
        result = work()
    except UserError as error:
        mine = error.problems
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, problems in enumerate(everyone):
        if problems is not None:
            named = UserError(*(f"[rank {rank}] {line}" if rank else line for line in problems))
            named.said_by = 0
            raise named
    return result


@contextmanager
def locked(run_directory: Path) -> Iterator[None]:
    """Rank 0 holds the run's lock inside. Raises UserError on every rank if another training has it."""
    held: list[RunLock] = []
    on_rank_0(lambda: held.append(RunLock(run_directory)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def verify(directory: Path) -> list[str]:
    """manifest.verify, every rank hashing its share of the files. Returns the same lines on every rank."""

    def first_look() -> tuple[dict[str, manifest.Entry], list[str]]:
        try:
            entries = manifest.read(directory)
        except ValueError as error:
            return {}, [str(error)]
        return entries, manifest.unexpected(directory, entries)

    entries, problems = on_rank_0(first_look)
    mine = _mine({name: entry.num_bytes for name, entry in entries.items()})
    problems += [line for part in _gather(lambda: manifest.compare(directory, entries, mine)) for line in part]
    if not problems:
        manifest.remember(directory)
    return problems


def _mine(sizes: dict[str, int]) -> list[str]:
    return manifest.share(sizes, dist.get_rank(), dist.get_world_size())


def _gather(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns on each rank, on every rank. An OSError of any rank is raised on every rank."""
    try:
        mine = work()
    except OSError as error:
        mine = error
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    for part in parts:
        if isinstance(part, OSError):
            raise part
    return parts


def first_cause(error: BaseException) -> BaseException:
    """What went wrong on some rank, out of PyTorch's CheckpointException; any other error is its own cause."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


@contextmanager
def failing_at_once() -> Iterator[None]:
    """With several ranks, an exception other than UserError ends the process here, after its traceback.

    Left to the interpreter, a rank whose peers have died waits for them in destructors until torchrun's 30 seconds are
    over, and the restart waits as long.
    """
    try:
        yield
    except UserError:
        raise
    except Exception:
        if dist.get_world_size() == 1:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
