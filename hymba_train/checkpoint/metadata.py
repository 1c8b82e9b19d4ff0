"""checkpoint.json: what a checkpoint holds, readable without Megatron-Core and without unpickling anything."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.checkpoint.directory import METADATA
from hymba_train.config import flatten, to_plain
from hymba_train.config.schema import Config
from hymba_train.errors import UserError

if TYPE_CHECKING:
    from hymba_train.parallel.runtime import Runtime

SCHEMA_VERSION = 1  # of our parameter names and of this file

# Model keys that neither shape a parameter nor change what the parameters mean.
_FREE_KEYS = {"name", "init_method", "init_method_std", "make_vocab_size_divisible_by"}
# Keys that a later stage of training changes on purpose (context extension).
_CONTEXT_KEYS = {"rope_type", "rotary_base", "max_position_embeddings", "rope_original_max_positions"}


@dataclass(frozen=True)
class Layout:
    """How a run was spread over processes. RNG states belong to one layout; everything else fits any."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    data: int
    world_size: int
    device: str

    @classmethod
    def of(cls, config: Config, runtime: Runtime) -> Layout:
        p, r = config.parallel, runtime
        return cls(p.tensor, p.pipeline, p.virtual_pipeline, r.data_parallel_size, r.world_size, r.device.type)


def metadata_of(
    config: Config, layout: Layout, state: dict[str, int], data: dict[str, Any] | None = None,
    guards: dict[str, Any] | None = None, origin: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of checkpoint.json. ``data``: :meth:`hymba_train.data.DataRecord.to_dict`; ``guards``: the memory of
    the guards, plain data; ``origin``: :func:`origin_of` the checkpoint that this run started from."""
    import torch

    plain = to_plain(config)
    return {
        "format": "hymba_train",
        "schema_version": SCHEMA_VERSION,
        "step": state["step"],
        "train_state": state,
        "data": data,
        "guards": guards,
        "origin": origin,
        "layout": dataclasses.asdict(layout),
        "config": plain,
        "config_sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron_core": importlib.metadata.version("megatron-core"),
        },
    }


def write_metadata(directory: Path, metadata: dict[str, Any]) -> None:
    """Write checkpoint.json into a step directory that is not published yet."""
    (directory / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def read_metadata(directory: Path) -> dict[str, Any]:
    """Read checkpoint.json. Raises UserError if it is missing, unreadable, or of a newer schema."""
    path = directory / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        version, layout = metadata["schema_version"], metadata["layout"]
        metadata["config"]["model"], metadata["train_state"], Layout(**layout)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); choose another checkpoint, or move {directory} "
            "away to fall back on an older one"
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {version}, this program reads {SCHEMA_VERSION}: upgrade hymba_train")
    return metadata


def origin_of(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """``source`` (a name) and ``license`` (None: not stated) of the foreign weights that a checkpoint goes back to,
    through however many runs; None for weights that began here."""
    imported = metadata.get("imported")
    return {key: imported[key] for key in ("source", "license")} if imported else metadata.get("origin")


def check_model(directory: Path, metadata: dict[str, Any], config: Config) -> list[str]:
    """Hold a checkpoint's model to the configured one.

    Returns remarks about keys of the context's length that differ. Raises UserError, one line a key, for every other
    difference.
    """
    saved, now = metadata["config"]["model"], to_plain(config.model)
    problems, remarks = [], []
    for key in sorted((saved.keys() | now.keys()) - _FREE_KEYS):
        old, new = saved.get(key), now.get(key)
        if old == new:
            continue
        if key in _CONTEXT_KEYS:
            remarks.append(f"model.{key} is {new} now, {old} in {directory.name}")
        else:
            problems.append(
                f"{directory}: the checkpoint has model.{key}={old}, the configuration {new}: it is another model"
            )
    if problems:
        raise UserError(*problems)
    return remarks


def changed_keys(metadata: dict[str, Any], config: Config) -> list[str]:
    """'key: old -> new' for every value that shapes training and differs from the checkpoint's."""
    saved, now = flatten(metadata["config"]), flatten(to_plain(config))
    return [
        f"{key}: {saved.get(key)} -> {now.get(key)}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and key.split(".")[0] in ("data", "optim", "schedule", "precision")
    ]
