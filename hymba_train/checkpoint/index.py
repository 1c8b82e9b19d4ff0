"""``.metadata``, the index of a PyTorch distributed checkpoint, read without running the pickle that it is."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from hymba_train.errors import UserError

INDEX = ".metadata"
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "collections": {"OrderedDict"},
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint index needs")


def read_index(directory: Path) -> Metadata:
    """The index of a checkpoint. Raises UserError, and has run nothing, if it is damaged or holds foreign objects."""
    path = directory / INDEX
    try:
        with open(path, "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is no index")
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if Path(name).name != name:
                raise pickle.UnpicklingError(f"it names the file {name!r}, which is not in this directory")
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: cannot be read as a checkpoint index ({error}); choose another checkpoint") from error
    return metadata
