"""Work on a run directory that ranks do together, or that one does for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from hymba_train.checkpoint import manifest
from hymba_train.checkpoint.run_lock import RunLock
from hymba_train.parallel.ranks import gather, on_rank_0


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
    problems += [line for part in gather(lambda: manifest.compare(directory, entries, mine)) for line in part]
    if not problems:
        manifest.remember(directory)
    return problems


def _mine(sizes: dict[str, int]) -> list[str]:
    return manifest.share(sizes, dist.get_rank(), dist.get_world_size())


def first_cause(error: BaseException) -> BaseException:
    """What went wrong on some rank, out of PyTorch's CheckpointException; any other error is its own cause."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
