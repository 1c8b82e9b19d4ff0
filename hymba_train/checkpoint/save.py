"""Writing checkpoints, in the foreground or behind the training loop's back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from hymba_train.checkpoint import directory, together, tree
from hymba_train.checkpoint.children import children_die_with_us
from hymba_train.checkpoint.metadata import write_metadata
from hymba_train.checkpoint.optimizer_state import SHARDING, optimizer_state, optimizer_step, sharded_tensors
from hymba_train.checkpoint.together import first_cause
from hymba_train.errors import UserError

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves a run into ``root``. Every method is called by all ranks alike.

    ``chunks`` are the model chunks in DistributedDataParallel, with their parameters gathered (no forward hook of
    overlap_param_gather may be pending). ``metadata`` makes checkpoint.json from the train state's dict.

    With ``asynchronous`` the tensors are copied and a forked process writes them while training goes on; the
    checkpoint is published by the first :meth:`poll` after all ranks' writers are done. One save is under way at a
    time. A save that failed raises UserError on every rank, at :meth:`save` or :meth:`poll`; it leaves no checkpoint of
    its step, and the older ones as they were.
    """

    def __init__(
        self, root: Path, runtime, chunks: list, optimizer, metadata: Callable[[dict[str, int]], dict[str, Any]],
        asynchronous: bool,
    ) -> None:  # fmt: skip
        self.root, self.runtime, self.chunks, self.optimizer = root, runtime, chunks, optimizer
        self.metadata, self.asynchronous = metadata, asynchronous
        self._queue = AsyncCallsQueue()
        # Data-parallel ranks hold the same tensors: each writes its share, instead of the first one all of them.
        self._strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy(), runtime.groups.dp_cp, do_cache_distribution=True
        )
        self._published: list[Path] = []
        self._under_way = root  # path of the save in the background
        self._needed_bytes = 0  # of the latest save
        if runtime.rank == 0:
            for path in directory.remove_leftovers(root):
                logger.warning("removed %s, left by a process that died while writing it", path)

    def save(self, state: dict[str, int], wait: bool = False) -> None:
        """Save weights, optimizer, RNG and ``state``. ``wait``: return only when it is published."""
        self._finish()
        step = state["step"]
        path = self.root / f"{directory.step_name(step)}.incomplete"
        model = tree.model_tree(self.chunks)
        content = {
            **model,
            "optimizer": optimizer_state(self.optimizer, model, loading=False).tensors,
            "rng": tree.rng_tree(self.runtime.rank, self.runtime.world_size),
            "train_state": dict(state),
            "optimizer_step": optimizer_step(self.optimizer),
        }
        self._needed_bytes = self._count_bytes(content)
        together.on_rank_0(lambda: self._start(step))
        metadata = self.metadata(state)
        in_background = self.asynchronous and not wait
        with self._errors_named(path), children_die_with_us():
            request = dist_checkpointing.save(
                content, str(path), self._strategy, content_metadata=dict(SHARDING),
                async_sharded_save=in_background, async_strategy="mcore",
            )  # fmt: skip
            if request is None:
                self._publish(path, metadata)
                return
        self._under_way = path
        request.add_finalize_fn(lambda: self._publish(path, metadata))
        with children_die_with_us():
            self._queue.schedule_async_request(request)

    def poll(self, wait: bool = False) -> list[Path]:
        """Publish what has been written by now (``wait``: what is under way at all); returns the new directories.

        Talks to the other ranks only while a save is under way.
        """
        self._finish(wait)
        published, self._published = self._published, []
        return published

    def _finish(self, wait: bool = True) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._errors_named(self._under_way):
                self._queue.maybe_finalize_async_calls(blocking=wait)

    def _start(self, step: int) -> Path:
        """On rank 0: an empty directory, if there is room for what will be written into it."""
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < self._needed_bytes:
            raise UserError(self._no_room(self.root / directory.step_name(step), free))
        return directory.start_step(self.root, step)

    def _no_room(self, path: Path, free: int) -> str:
        return (
            f"{path}: no room for this checkpoint: {self._needed_bytes} bytes are needed, {free} are free; make room "
            "and start again (older checkpoints are as they were)"
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
            if "No space left" in reason or "quota" in reason.lower():
                raise UserError(self._no_room(path, shutil.disk_usage(self.root).free)) from error
            raise UserError(
                f"{path}: cannot be written ({reason}); {self._needed_bytes} bytes are needed, "
                f"{shutil.disk_usage(self.root).free} are free; older checkpoints are as they were"
            ) from error

    def _publish(self, path: Path, metadata: dict[str, Any]) -> None:
        together.on_rank_0(lambda: write_metadata(path, metadata))
        together.write_manifest(path)
        self._published.append(together.on_rank_0(lambda: directory.publish(path)))
