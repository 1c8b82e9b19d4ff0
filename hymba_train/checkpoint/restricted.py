"""Loading through PyTorch and Megatron-Core without running anything that a checkpoint holds.

Both unpickle freely: ``.metadata`` with ``pickle.load``, non-tensors with ``torch.load(weights_only=False)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from hymba_train.checkpoint.index import read_index

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Inside, ``.metadata`` goes through an allow-list of classes and every ``torch.load`` is weights-only, also where
    the caller asks for the opposite. For a checkpoint that holds more than tensors and plain values they raise."""
    variables = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    original = FileSystemReader.read_metadata
    os.environ[_FORCE] = "1"
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]  # replaced on purpose
    try:
        yield
    finally:
        FileSystemReader.read_metadata = original  # type: ignore[method-assign]  # as it was
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in variables.items() if value is not None})


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """FileSystemReader.read_metadata with our unpickler. Raises UserError for anything but an index."""
    metadata = read_index(Path(self.path))
    storage = getattr(metadata, "storage_meta", None) or StorageMeta()
    storage.load_id = self.load_id
    metadata.storage_meta = storage
    return metadata
