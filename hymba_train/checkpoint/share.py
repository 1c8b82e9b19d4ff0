"""What each rank writes of a checkpoint: planned by Megatron-Core on all ranks together, held in host memory."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from hymba_train.checkpoint.optimizer_state import SHARDING

BACKEND, BACKEND_VERSION = "torch_dist", 1


@dataclass(frozen=True)
class Share:
    """Files of one rank, and on rank 0 what the index is made from.

    ``files``: name -> entries, in the order in which they lie there. CPU tensors, which on a CPU are the training's
    own: write them in a fork, or before training goes on.
    """

    files: dict[str, list[tuple[MetadataIndex, io.BytesIO | torch.Tensor]]]
    finish: Callable[[list[WriteResult]], None]

    @staticmethod
    def result(index: MetadataIndex, file: str, offset: int, num_bytes: int) -> WriteResult:
        """Where an entry lies, in PyTorch's words; :attr:`finish` takes those of all ranks and writes ``.metadata``."""
        return WriteResult(index, num_bytes, _StorageInfo(file, offset, num_bytes))


class Planner:
    """Takes shares. Data-parallel ranks hold the same tensors: each writes its part, instead of the first one all."""

    def __init__(self, group: Any) -> None:
        self._strategy = _Strategy(BACKEND, BACKEND_VERSION, thread_count=1)
        self._wrapper = FullyParallelSaveStrategyWrapper(self._strategy, group, do_cache_distribution=True)
        known = inspect.signature(dist_checkpointing.save).parameters
        # Megatron-Core 0.19 prefers a writer of another package by default; 0.16 has but one.
        self._options = {"async_strategy": "mcore"} if "async_strategy" in known else {}

    def share(self, content: dict[str, Any], directory: Path) -> Share:
        """This rank's part of ``content`` (a tree of sharded tensors). Collective. Tensors are copied off the GPU."""
        with _no_queue():
            dist_checkpointing.save(
                content, str(directory), self._wrapper, content_metadata=dict(SHARDING), async_sharded_save=True,
                **self._options,
            )  # fmt: skip
        assert self._strategy.planned is not None, "Megatron-Core has planned nothing"
        writer, index = self._strategy.planned
        self._strategy.planned = None
        files = {}
        for _, name, (objects, tensors) in writer.write_buckets:
            entries = [(item.index, data) for item, data in (*objects, *tensors)]
            assert all(item.type == WriteItemType.BYTE_IO for item, _ in objects)
            files[name] = [(i, d.to("cpu") if isinstance(d, torch.Tensor) else d) for i, d in entries]
        return Share(files, lambda results: writer.finish(index, [results]))


class _Strategy(TorchDistSaveShardedStrategy):
    """Keeps what Megatron-Core has planned, instead of handing it to its own background writer."""

    planned: tuple[Any, Any] | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> AsyncRequest:
        self.planned = writer, planned[1]
        return AsyncRequest(None, (), [])


@contextmanager
def _no_queue() -> Iterator[None]:
    """Megatron-Core's plan starts a server process for its writer's answers, which takes seconds and outlives a killed
    rank. Our writer does not need it."""
    names = ("get_write_results_queue", "_get_write_results_queue")  # Megatron-Core 0.19 and 0.16
    (name,) = (name for name in names if hasattr(filesystem_async, name))
    original = getattr(filesystem_async, name)
    setattr(filesystem_async, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(filesystem_async, name, original)
