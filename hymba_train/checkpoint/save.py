"""Saving a run: the content is taken on all ranks at once, and written by a forked process of each."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch.distributed.checkpoint.api import CheckpointException

from hymba_train.checkpoint import directory, manifest, tree
from hymba_train.checkpoint.background import Background
from hymba_train.checkpoint.optimizer_state import optimizer_state, optimizer_step, sharded_tensors
from hymba_train.checkpoint.share import Planner, Share
from hymba_train.checkpoint.together import first_cause
from hymba_train.checkpoint.writing import publish, write_share
from hymba_train.errors import UserError
from hymba_train.files import make_private
from hymba_train.parallel.gathered import gathered_parameters
from hymba_train.parallel.ranks import on_rank_0
from hymba_train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_FINISH = 60.0  # that a failing training gives a checkpoint which is being written
MOST_REASONS = 3  # of ranks that failed, in a message


@dataclass
class _UnderWay:
    """A save in the background."""

    path: Path
    process: Background | None
    failure: str  # why there is no process

    def outcome(self) -> str | None:
        """As :meth:`Background.outcome`."""
        return self.process.outcome() if self.process else self.failure


class CheckpointWriter:
    """Saves a run into ``root``. Every method is called by all ranks alike.

    ``chunks`` are the model chunks in DistributedDataParallel. ``metadata`` makes checkpoint.json from the train
    state's dict. ``retain`` runs on rank 0, in the background, after a checkpoint has been published.

    A save is one path, in the background or not: tensors are copied off the GPU, and a fork of each rank writes and
    verifies its share; rank 0's publishes. Without ``asynchronous`` :meth:`save` waits for it. One save is under way at
    a time. A save that failed, or whose process died, on any rank raises UserError on every rank, at the next
    :meth:`save` or :meth:`poll`; it leaves no checkpoint of its step, and the older ones as they were.
    """

    def __init__(
        self, root: Path, runtime: Runtime, chunks: list, optimizer: Any,
        metadata: Callable[[dict[str, int]], dict[str, Any]], asynchronous: bool,
        retain: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self.root, self.runtime, self.chunks, self.optimizer = root, runtime, chunks, optimizer
        self.metadata, self.asynchronous, self.retain = metadata, asynchronous, retain
        self._planner = Planner(runtime.groups.dp_cp)
        self._published: list[Path] = []
        self._under_way: _UnderWay | None = None
        self._asked_about: _UnderWay | None = None
        self._needed_bytes = 0  # of the latest save
        if runtime.rank == 0:
            for path in directory.remove_leftovers(root):
                logger.warning("removed %s, left by a process that died while writing it", path)

    def save(self, state: dict[str, int], wait: bool = False) -> None:
        """Save weights, optimizer, RNG and ``state``. ``wait``: return only when it is published."""
        self._finish()
        step = state["step"]
        path = self.root / f"{directory.step_name(step)}.incomplete"
        with self._errors_named(path), gathered_parameters(self.chunks):
            content = self._content(state)
            self._needed_bytes = self._count_bytes(content)
            on_rank_0(lambda: self._start(step))
            metadata = self.metadata(state)
            share = self._planner.share(content, path)
        self._under_way = self._begin(path, share, metadata)
        if wait or not self.asynchronous:
            self._finish()

    def status(self) -> tuple[int, int]:
        """(whether this rank's part of the save under way has failed, whether it is being written), to be summed over
        the ranks by whoever talks to them anyway, for the :meth:`poll` after that."""
        self._asked_about = current = self._under_way
        outcome = current.outcome() if current else ""
        return int(bool(outcome)), int(outcome is None)

    def poll(self, wait: bool = False, sums: Sequence[int] = ()) -> list[Path]:
        """What has been published since the last call; looks after the writers.

        ``sums`` of every rank's :meth:`status`, equal on all of them, end the save that was under way then, in success
        or not, without another exchange. Only with ``wait`` for the one under way the ranks talk to each other here.
        """
        if wait:
            self._finish()
        elif sums and self._under_way is not None and self._asked_about is self._under_way:
            self._conclude(*sums)
        published, self._published = self._published, []
        return published

    def finish_alone(self) -> None:
        """After an exception: let this rank's process end its work, for a while, without talking to other ranks."""
        if self._under_way is not None and self._under_way.process is not None:
            self._under_way.process.wait(SECONDS_TO_FINISH)

    def _content(self, state: dict[str, int]) -> dict[str, Any]:
        model, fp8 = tree.model_tree(self.chunks), tree.fp8_tree(self.chunks, self.runtime)
        return {
            **model,
            **({"fp8": fp8} if fp8 else {}),
            "optimizer": optimizer_state(self.optimizer, model, loading=False).tensors,
            "rng": tree.rng_tree(self.runtime.rank, self.runtime.world_size),
            "train_state": dict(state),
            "optimizer_step": optimizer_step(self.optimizer),
        }

    def _begin(self, path: Path, share: Share, metadata: dict[str, Any]) -> _UnderWay:
        rank, num_ranks = self.runtime.rank, self.runtime.world_size

        def work() -> None:
            write_share(share, path, rank)
            if rank == 0:
                publish(share, path, metadata, num_ranks)
                self._retain()

        try:
            return _UnderWay(path, Background(work), "")
        except OSError as error:  # the other ranks have theirs: they learn of it when they ask next
            return _UnderWay(path, None, f"no process for the writer ({error.strerror})")

    def _retain(self) -> None:
        """A checkpoint too many is no reason to call a good one failed."""
        if self.retain is not None:
            try:
                self.retain()
            except OSError as error:
                logger.warning("%s: older checkpoints cannot be deleted (%s)", self.root, error)

    def _finish(self) -> None:
        """Wait for the save under way, if there is one."""
        while self._under_way is not None:
            self._conclude(*self._sums(*self.status()))
            if self._under_way is not None:
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _conclude(self, failed: int, running: int) -> None:
        """What follows, on all ranks alike, from how many of them have failed and how many still write."""
        current = self._under_way
        assert current is not None
        if failed:
            self._under_way = None
            self._give_up(current, current.outcome())
        if not running:
            self._under_way = None
            final = current.path.with_name(current.path.name.removesuffix(".incomplete"))
            manifest.remember(final)  # its writer has just read it
            self._published.append(final)

    def _sums(self, *values: int) -> list[int]:
        """How many ranks say so, of each value."""
        total = torch.tensor(values, dtype=torch.int32, device=self.runtime.device)
        dist.all_reduce(total)
        return total.tolist()

    def _give_up(self, current: _UnderWay, outcome: str | None) -> None:
        """End what still writes, on all ranks, and raise on all of them what went wrong on some."""
        if current.process:
            current.process.kill()
        reasons: list[str | None] = [None] * self.runtime.world_size
        dist.all_gather_object(reasons, outcome)
        free = on_rank_0(lambda: self._clean_up(current.path))
        ranks = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        raise self._error(current.path, "; ".join(ranks[:MOST_REASONS]), free)

    def _clean_up(self, path: Path) -> int:
        """Remove what there is of a failed save; -> bytes that were free before."""
        free = shutil.disk_usage(self.root).free
        with suppress(OSError):
            directory.remove(path)
        return free

    def _start(self, step: int) -> Path:
        """On rank 0: an empty directory, if there is room for what will be written into it."""
        make_private(self.root)
        free = shutil.disk_usage(self.root).free
        if free < self._needed_bytes:
            raise self._error(self.root / directory.step_name(step), "No space left", free)
        return directory.start_step(self.root, step)

    def _error(self, path: Path, reason: str, free: int) -> UserError:
        full = "No space left" in reason or "quota" in reason.lower()
        what = "no room for this checkpoint" if full else "cannot be written"
        todo = "make room and start again" if full else "see to the disk and start again"
        return UserError(
            f"{path}: {what}: {self._needed_bytes} bytes are needed, {free} are free ({reason}); {todo}; older "
            "checkpoints are as they were"
        )

    def _count_bytes(self, content: dict[str, Any]) -> int:
        """Bytes of all tensors that the ranks write together."""
        mine = sum(t.data.nbytes for t in sharded_tensors(content) if is_main_replica(t.replica_id))
        total = torch.tensor([mine], dtype=torch.int64, device=self.runtime.device)
        dist.all_reduce(total)
        return int(total)

    @contextmanager
    def _errors_named(self, path: Path) -> Iterator[None]:
        """Turn what the machine can do to a save into one line with the path, and the room if that is the cause."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            cause = first_cause(error)
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
            raise self._error(path, reason, free) from error
