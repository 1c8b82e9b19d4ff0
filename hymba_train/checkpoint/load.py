"""Reading checkpoints, under the layout that wrote them or any other."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from hymba_train.checkpoint import directory, together, tree
from hymba_train.checkpoint.index import read_index
from hymba_train.checkpoint.metadata import Layout, changed_keys, check_model, read_metadata
from hymba_train.checkpoint.optimizer_state import (
    optimizer_state,
    put_back,
    sharded_tensors,
    stored_masters_as_weights,
    take_empty,
    weights_as_masters,
)
from hymba_train.checkpoint.restricted import nothing_runs
from hymba_train.config.schema import Config
from hymba_train.errors import UserError
from hymba_train.parallel.ranks import on_rank_0
from hymba_train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)
MOST_PROBLEMS = 5  # lines of a report; a lost directory can have thousands of damaged files


@dataclass(frozen=True)
class Source:
    """A checkpoint to start from. ``weights_only``: optimizer, RNG and position start afresh."""

    path: Path
    weights_only: bool
    remarks: tuple[str, ...] = ()


def find_source(config: Config, run_directory: Path | None) -> Source | None:
    """The run's own newest checkpoint; without one, what checkpoint.load names; else None (random initialisation).
    Without ``run_directory``, what checkpoint.load names.

    Every rank calls it and gets the same. The checkpoint's files agree with its manifest; one that does not is passed
    over for the next older one. Raises UserError, on all ranks, if there are checkpoints but none is whole: a run never
    starts from random weights because a file cannot be read.
    """
    candidates, weights_only, remarks = on_rank_0(lambda: _candidates(config, run_directory))
    rejected: list[str] = []
    for path in candidates:
        problems = together.verify(path)
        if not problems:
            return Source(path, weights_only, tuple(remarks))
        rejected += problems
        if dist.get_rank() == 0:
            for problem in problems[:MOST_PROBLEMS]:
                logger.warning("%s; looking for an older checkpoint than %s", problem, path.name)
    if rejected:
        more = [f"... and {len(rejected) - MOST_PROBLEMS} more"] if len(rejected) > MOST_PROBLEMS else []
        raise UserError(
            f"{candidates[0].parent}: no checkpoint can be trusted; restore one from a copy, or start under another "
            "run.name",
            *rejected[:MOST_PROBLEMS],
            *more,
        )
    return None


def _candidates(config: Config, run_directory: Path | None) -> tuple[list[Path], bool, list[str]]:
    """(step directories to try in turn, whether only weights are wanted, remarks)."""
    if run_directory is not None:
        root = run_directory / directory.CHECKPOINTS
        path, remarks = directory.newest(root)
        if path is not None:
            return [path, *directory.older(path)], False, remarks
        if directory.has_any(root):
            raise UserError(
                f"{root}: there are checkpoints, but none is complete ({'; '.join(remarks) or 'no latest'}); repair "
                "one, or start under another run.name"
            )
    kept = config.checkpoint
    found = [] if kept.load is None else resolve(Path(kept.load), "checkpoint.load")
    return found, run_directory is None or not kept.load_optimizer, []


def resolve(path: Path, key: str) -> list[Path]:
    """Step directories meant by ``path``: itself alone, or those of a run, the newest first and older ones after it.

    Raises UserError naming ``key`` if there is none.
    """
    found = directory.steps_at(path)
    if not found:
        raise UserError(f"{key}={path}: neither a complete step directory (step_0001000) nor a run directory with one")
    return found


@dataclass(frozen=True)
class Loaded:
    """``state``: the train state's dict, None if only weights were taken. RNG states belong to a layout: under another
    one they are not restored, and the caller seeds anew."""

    state: dict[str, int] | None
    rng_restored: bool


def load_checkpoint(source: Source, config: Config, runtime: Runtime, chunks: list, optimizer: Any) -> Loaded:
    """Load weights and, unless ``weights_only``, optimizer, RNG and position.

    Every rank calls it, with its model chunks in DistributedDataParallel. Nothing in the checkpoint is executed. Raises
    UserError for another model, missing tensors, unreadable files, or pickled objects that no checkpoint needs.
    """
    metadata = read_metadata(source.path)
    remarks = [*source.remarks, *check_model(source.path, metadata, config)]
    same_layout = metadata["layout"] == asdict(Layout.of(config, runtime))
    read_index(source.path)  # before PyTorch or Megatron-Core look into the directory
    try:
        with nothing_runs():
            state = _load(source, runtime, chunks, optimizer, same_layout)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # PyTorch's CheckpointException is no Exception
        cause = together.first_cause(error)
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise UserError(f"{source.path}: cannot be loaded ({reason}); move it away to take an older one") from error
    if not source.weights_only:
        remarks += changed_keys(metadata, config)
        if not same_layout:
            remarks.append(f"written under the layout {metadata['layout']}: RNG seeded anew from run.seed and the step")
    for remark in remarks if runtime.rank == 0 else ():
        logger.warning("%s: %s", source.path.name, remark)
    return Loaded(state, same_layout and not source.weights_only)


def _load(source: Source, runtime: Runtime, chunks: list, optimizer: Any, same_layout: bool) -> dict[str, int] | None:
    path = str(source.path)
    stored = dist_checkpointing.load_tensors_metadata(path)
    model = tree.model_tree(chunks)
    exact = stored_masters_as_weights(model, stored)
    wanted: dict[str, Any] = {chunk: {k: v for k, v in part.items() if k not in exact[chunk]}
                              for chunk, part in model.items()}  # fmt: skip
    masters: dict[str, Any] = {}
    if not source.weights_only:
        optimizer_part = optimizer_state(optimizer, model, loading=True)
        masters = weights_as_masters(optimizer_part.tensors, set(stored))
        wanted["optimizer"] = optimizer_part.tensors
        if same_layout:
            wanted["rng"] = tree.rng_tree(runtime.rank, runtime.world_size)
        fp8 = tree.fp8_tree(chunks, runtime)
        if fp8 and any(name.startswith("fp8.") for name in stored):
            wanted["fp8"] = fp8
        elif fp8 and runtime.rank == 0:
            logger.warning("%s has no scales of FP8: delayed scaling begins anew", source.path.name)
    _check_tensors(source.path, wanted, stored)
    loaded = _read(wanted, path)
    if _anywhere(any(exact.values())):
        for chunk, part in _read(exact, path).items():
            loaded[chunk] |= part
    tree.load_model_tree(chunks, loaded)
    tree.load_fp8_tree(chunks, loaded.get("fp8", {}))
    if source.weights_only:
        optimizer.reload_model_params()
        return None
    parts = [loaded["optimizer"]]
    if _anywhere(bool(masters)):
        parts.append(_read({"masters": masters}, path)["masters"])
    optimizer_part.load(parts, loaded["optimizer_step"])
    if same_layout:
        tree.load_rng_tree(loaded["rng"])
    return loaded["train_state"]


def _read(wanted: dict[str, Any], path: str) -> dict[str, Any]:
    """dist_checkpointing.load, also for entries of which this rank holds nothing (a vocabulary block of padding alone),
    which Megatron-Core loses on the way."""
    nothing = take_empty(wanted)
    loaded = dist_checkpointing.load(wanted, path)
    put_back(loaded, nothing)
    return loaded


def _anywhere(something: bool) -> bool:
    """Whether any rank has something to load: loading is collective."""
    answers: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(answers, something)
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
