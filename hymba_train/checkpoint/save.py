"""Writing checkpoints, in the foreground or behind the training loop's back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from hymba_train.checkpoint import directory, tree
from hymba_train.checkpoint.metadata import write_metadata
from hymba_train.checkpoint.optimizer_state import SHARDING, optimizer_state, optimizer_step

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves a run into ``root``. Every method is called by all ranks alike.

    ``chunks`` are the model chunks in DistributedDataParallel, with their parameters gathered (no forward hook of
    overlap_param_gather may be pending). ``metadata`` makes checkpoint.json from the train state's dict.

    With ``asynchronous`` the tensors are copied and a forked process writes them while training goes on; the
    checkpoint is published by the first :meth:`poll` after all ranks' writers are done. One save is under way at a
    time. A writer that failed raises CheckpointException on every rank, at :meth:`poll` or the next :meth:`save`.
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
        if runtime.rank == 0:
            for path in directory.remove_leftovers(root):
                logger.warning("removed %s, left by a process that died while writing it", path)

    def save(self, state: dict[str, int], wait: bool = False) -> None:
        """Save weights, optimizer, RNG and ``state``. ``wait``: return only when it is published."""
        self._finish()
        step = state["step"]
        path = self.root / f"{directory.step_name(step)}.incomplete"
        if self.runtime.rank == 0:
            directory.start_step(self.root, step)
        dist.barrier()
        model = tree.model_tree(self.chunks)
        content = {
            **model,
            "optimizer": optimizer_state(self.optimizer, model, loading=False).tensors,
            "rng": tree.rng_tree(self.runtime.rank, self.runtime.world_size),
            "train_state": dict(state),
            "optimizer_step": optimizer_step(self.optimizer),
        }
        metadata = self.metadata(state)
        in_background = self.asynchronous and not wait
        request = dist_checkpointing.save(
            content, str(path), self._strategy, content_metadata=dict(SHARDING),
            async_sharded_save=in_background, async_strategy="mcore",
        )  # fmt: skip
        if request is None:
            self._publish(path, metadata)
        else:
            request.add_finalize_fn(lambda: self._publish(path, metadata))
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
            self._queue.maybe_finalize_async_calls(blocking=wait)

    def _publish(self, path: Path, metadata: dict[str, Any]) -> None:
        if self.runtime.rank == 0:
            write_metadata(path, metadata)
            directory.publish(path)
        dist.barrier()
        self._published.append(path.with_name(path.name.removesuffix(".incomplete")))
