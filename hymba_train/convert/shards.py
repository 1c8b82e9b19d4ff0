"""Writing safetensors files tensor by tensor, so that memory holds one tensor and not one file."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_train.convert.published import INDEX, SINGLE

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_FRAMEWORK = {"format": "pt"}  # transformers refuses a file that does not say what wrote it


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    directory: Path, tensors: Sequence[PlannedTensor], read: Callable[[str], Tensor], max_shard_bytes: int
) -> list[str]:
    """Write ``tensors`` in their order, as one model.safetensors or as shards with an index.

    Args:
        read: gives a planned tensor by name, in any floating type.
        max_shard_bytes: most bytes of tensors in a file; a tensor larger than that gets a file of its own.

    Returns the names of the files. Their bytes depend on the arguments and on nothing else.
    """
    groups: list[list[PlannedTensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.num_bytes for t in groups[-1]) + tensor.num_bytes > max_shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        _write_file(directory / name, group, read)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(t.num_bytes for t in tensors)},
            "weight_map": {t.name: name for name, group in zip(names, groups, strict=True) for t in group},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return names


def _write_file(path: Path, tensors: Sequence[PlannedTensor], read: Callable[[str], Tensor]) -> None:
    """The format: length of the header (8 bytes, little endian), header (JSON), data without gaps."""
    ordered = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # stable; keeps every tensor aligned to its type
    header: dict[str, Any] = {"__metadata__": _FRAMEWORK}
    offset = 0
    for t in ordered:
        span = [offset, offset + t.num_bytes]
        header[t.name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": span}
        offset += t.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for t in ordered:
            tensor = read(t.name).to(t.dtype).contiguous()
            assert tuple(tensor.shape) == t.shape, (t.name, tensor.shape)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
