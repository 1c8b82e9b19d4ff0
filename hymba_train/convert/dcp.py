"""Tensors of PyTorch distributed checkpoints without a process group, one at a time, and without running pickles.

The index comes through :mod:`hymba_train.checkpoint.index`, tensors through torch's weights-only loader.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from hymba_train.checkpoint.index import INDEX, read_index
from hymba_train.errors import UserError


class CheckpointReader:
    """Tensors of one step directory by their names in the checkpoint, assembled from the parts of all ranks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata = read_index(directory)
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None if there is no tensor of that name."""
        stored = self.metadata.state_dict_metadata.get(key)
        return tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None

    def read(self, key: str) -> Tensor:
        """A whole tensor, on the CPU. Raises UserError if a file is missing or damaged."""
        stored = self.metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata), key
        target = {key: torch.empty(stored.size, dtype=stored.properties.dtype)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(target, self.metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{self.directory}: {key} cannot be read ({reason}); choose another checkpoint") from error
        return target[key]


class CheckpointWriter:
    """Writes a checkpoint of whole tensors that Megatron-Core loads under any layout, one tensor at a time.

    One file and one part a tensor. Use as a context manager; the index is written on leaving it without an exception.
    """

    DATA = "__0_0.distcp"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[str, Any] = {}
        self._stored: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> CheckpointWriter:
        self._file: BinaryIO = open(self.directory / self.DATA, "wb")
        content = io.BytesIO()
        torch.save([{}], content)  # Megatron-Core's place for what is no tensor
        self._append(MetadataIndex("common_state/shard_0_1"), content.getvalue())
        self._entries["common_state/shard_0_1"] = BytesStorageMetadata()
        return self

    def write(self, key: str, tensor: Tensor) -> None:
        """Append one tensor, contiguous and on the CPU."""
        content = io.BytesIO()
        torch.save(tensor.contiguous().clone(), content)  # a view would bring its whole storage along
        offsets = torch.Size([0] * tensor.dim())
        self._append(MetadataIndex(key, offsets), content.getbuffer())
        chunk = ChunkStorageMetadata(offsets, tensor.shape)
        self._entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [chunk])

    def _append(self, index: MetadataIndex, content: bytes | memoryview) -> None:
        offset = self._file.tell()
        self._file.write(content)
        self._stored[index] = _StorageInfo(self.DATA, offset, len(content))

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is not None:
            return
        metadata = Metadata(self._entries, storage_data=self._stored, storage_meta=StorageMeta())
        metadata.version = "1.0.0"
        (self.directory / INDEX).write_bytes(pickle.dumps(metadata))
        described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.directory / "metadata.json").write_text(json.dumps(described))
