"""Names of the published checkpoint's tensors, and ours (hymba-architecture 4.1)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from hymba_train.describe.tensors import TensorDescription

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def hf_parts(description: TensorDescription) -> list[tuple[str, tuple[int, ...]]]:
    """(published name, published shape) of the tensors that make up one of ours, in the order of its rows."""
    name, shape = description.hf_name, description.shape
    if "{" in name:
        before, _, rest = name.partition("{")
        alternatives, _, after = rest.partition("}")
        rows = [s.size for s in description.slices]
        names = [before + part + after for part in alternatives.split(",")]
        return [(n, (r, *shape[1:])) for n, r in zip(names, rows, strict=True)]
    if name.endswith("conv1d.weight"):
        shape = (shape[0], 1, shape[1])
    return [(name, shape)]


def checkpoint_keys(description: TensorDescription) -> list[tuple[str, tuple[int, ...]]]:
    """(key, shape) in our checkpoints: the tensor, or each of its slices where it has several (parallel/cut.py)."""
    if len(description.slices) < 2:
        return [(description.name, description.shape)]
    shapes = [list(description.shape) for _ in description.slices]
    for shape, piece in zip(shapes, description.slices, strict=True):
        shape[description.cut_axis] = piece.size
    return [(f"{description.name}.{s.name}", tuple(shape)) for s, shape in zip(description.slices, shapes, strict=True)]


def checkpoint_entries(description: TensorDescription, full: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) in our checkpoints of one described tensor ``full``, in its true shape."""
    keys = [key for key, _ in checkpoint_keys(description)]
    parts = [full] if len(keys) == 1 else full.split([s.size for s in description.slices], dim=description.cut_axis)
    yield from zip(keys, parts, strict=True)
