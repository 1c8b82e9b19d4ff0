"""Reading checkpoints, under the layout that wrote them or any other."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from hymba_train.checkpoint import directory, tree
from hymba_train.checkpoint.metadata import Layout, changed_keys, check_model, read_metadata
from hymba_train.checkpoint.optimizer_state import optimizer_state, sharded_tensors, weights_as_masters
from hymba_train.config.schema import Config
from hymba_train.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint to start from. ``weights_only``: optimizer, RNG and position start afresh."""

    path: Path
    weights_only: bool
    remarks: tuple[str, ...] = ()


def find_source(config: Config, run_directory: Path) -> Source | None:
    """The run's own newest checkpoint; without one, what checkpoint.load names; else None (random initialisation).

    Asked of rank 0 alone, so that all ranks start from the same. Raises UserError, on all ranks, if there are
    checkpoints but none is complete: a run never starts from random weights because a file cannot be read.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [_find(config, run_directory)]
        except UserError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def _find(config: Config, run_directory: Path) -> Source | None:
    root = run_directory / directory.CHECKPOINTS
    path, remarks = directory.newest(root)
    if path is not None:
        return Source(path, False, tuple(remarks))
    if directory.has_any(root):
        raise UserError(
            f"{root}: there are checkpoints, but none is complete ({'; '.join(remarks) or 'no latest'}); repair one, "
            "or start under another run.name"
        )
    if config.checkpoint.load is None:
        return None
    path = resolve(Path(config.checkpoint.load), "checkpoint.load")
    return Source(path, not config.checkpoint.load_optimizer)


def resolve(path: Path, key: str) -> Path:
    """Step directory meant by ``path``: itself, or the newest one of a run. Raises UserError naming ``key``."""
    if directory.is_complete(path):
        return path
    for root in (path / directory.CHECKPOINTS, path):
        newest, _ = directory.newest(root)
        if newest is not None:
            return newest
    raise UserError(f"{key}={path}: neither a complete step directory (step_0001000) nor a run directory with one")


@dataclass(frozen=True)
class Loaded:
    """``state``: the train state's dict, None if only weights were taken. RNG states belong to a layout: under another
    one they are not restored, and the caller seeds anew."""

    state: dict[str, int] | None
    rng_restored: bool


def load_checkpoint(source: Source, config: Config, runtime, chunks: list, optimizer) -> Loaded:
    """Load weights and, unless ``weights_only``, optimizer, RNG and position.

    Every rank calls it, with its model chunks in DistributedDataParallel. Raises UserError for another model, missing
    tensors, or unreadable files.
    """
    metadata = read_metadata(source.path)
    remarks = [*source.remarks, *check_model(source.path, metadata, config, allow_context_change=True)]
    same_layout = metadata["layout"] == asdict(Layout.of(config, runtime))
    try:
        state = _load(source, runtime, chunks, optimizer, same_layout)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # PyTorch's CheckpointException is no Exception
        cause = next(iter(error.failures.values()))[0] if getattr(error, "failures", None) else error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise UserError(f"{source.path}: cannot be loaded ({reason}); move it away to take an older one") from error
    if not source.weights_only:
        remarks += changed_keys(metadata, config)
        if not same_layout:
            remarks.append(f"written under the layout {metadata['layout']}: RNG seeded anew from run.seed and the step")
    for remark in remarks if runtime.rank == 0 else ():
        logger.warning("%s: %s", source.path.name, remark)
    return Loaded(state, same_layout and not source.weights_only)


def _load(source: Source, runtime, chunks: list, optimizer, same_layout: bool) -> dict[str, int] | None:
    path = str(source.path)
    stored = dist_checkpointing.load_tensors_metadata(path)
    model = tree.model_tree(chunks)
    wanted: dict[str, Any] = dict(model)
    masters: dict[str, Any] = {}
    if not source.weights_only:
        optimizer_part = optimizer_state(optimizer, model, loading=True)
        masters = weights_as_masters(optimizer_part.tensors, set(stored))
        wanted["optimizer"] = optimizer_part.tensors
        if same_layout:
            wanted["rng"] = tree.rng_tree(runtime.rank, runtime.world_size)
    _check_tensors(source.path, wanted, stored)
    loaded = dist_checkpointing.load(wanted, path)
    tree.load_model_tree(chunks, loaded)
    if source.weights_only:
        optimizer.reload_model_params()
        return None
    parts = [loaded["optimizer"]]
    if _anywhere(masters):
        parts.append(dist_checkpointing.load({"masters": masters}, path)["masters"])
    optimizer_part.load(parts, loaded["optimizer_step"])
    if same_layout:
        tree.load_rng_tree(loaded["rng"])
    return loaded["train_state"]


def _anywhere(masters: dict) -> bool:
    """Whether any rank has something: loading is collective."""
    answers: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(answers, bool(masters))
    return any(answers)


def _check_tensors(path: Path, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Every wanted tensor is there, in its shape. Raises UserError naming the first few that are not."""
    problems = []
    for tensor in sharded_tensors(wanted):
        there = stored.get(tensor.key)
        if there is None:
            problems.append(f"{tensor.key} is missing")
        elif tuple(there.global_shape) != tuple(tensor.global_shape):
            problems.append(f"{tensor.key} is {tuple(there.global_shape)}, not {tuple(tensor.global_shape)}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: does not fit this model: {'; '.join(problems[:3])}{more}")
