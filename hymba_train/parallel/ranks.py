"""What ranks do together, or one does for all: everybody gets the result or the error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

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


def gather(work: Callable[[], Any]) -> list[Any]:
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
