"""Layouts for a number of GPUs, ranked by estimate. Free of torch."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hymba_train.config.schema import Config
from hymba_train.config.typed import flatten, to_plain
from hymba_train.describe import capacity
from hymba_train.errors import UserError
from hymba_train.plan.measured import estimate_times
from hymba_train.plan.plan import Plan, make_plan

DEFAULT_MEMORY_GIB = 80.0
MEMORY_IN_USE = 0.9  # the rest: CUDA itself, NCCL, fragments
# Rules of thumb, not measured: what each doubling of tensor parallelism costs within a node, what recomputing costs.
TENSOR_COST, RECOMPUTE_COST = 0.10, 1 / 3
SMALL_MICRO_BATCH_ROWS = 4096  # kernels of fewer rows fill a GPU badly
SMALL_COST = 0.08  # per halving below that


@dataclass(frozen=True)
class Suggestion:
    """One layout. ``relative_time`` is the estimated time of a step over that of perfectly parallel work."""

    tensor: int
    pipeline: int
    data: int
    micro_batch_sizes: tuple[int, ...]  # one a phase
    recompute: str
    memory_gib: float  # of the fullest GPU
    relative_time: float
    overrides: str  # to be added to those of the configuration; all that differs, micro-batches included
    days: float | None  # on the GPU asked for; None: not measured, or none was named


def suggest(
    config: Config, num_gpus: int, memory_gib: float = DEFAULT_MEMORY_GIB, most: int = 10, gpu: str | None = None
) -> list[Suggestion]:
    """Layouts of ``num_gpus`` GPUs that fit into ``memory_gib`` each, best first.

    Tensor parallelism of 1, 2, 4, 8; pipelines of 1, 2, 4, 8, 16; the optimizer split over the data-parallel ranks; for
    each the largest micro-batches, up to the configured ones, that fit, with recomputation only where they do not.

    Raises UserError if none fits, with the one that lacks least, or if no layout is possible at all.
    """
    found: list[Suggestion] = []
    problems: list[str] = []
    smallest: tuple[float, str] | None = None
    for candidate in _layouts(config, num_gpus):
        best = None
        for recompute in ("none", "full"):
            for shrink in range(6):
                try:
                    plan = make_plan(_with(candidate, recompute, shrink), num_gpus, check_paths=False)
                except UserError as error:
                    problems += error.problems
                    continue
                option = _rate(plan, config, gpu)
                if smallest is None or option.memory_gib < smallest[0]:
                    smallest = (option.memory_gib, option.overrides)
                if option.memory_gib <= memory_gib * MEMORY_IN_USE:
                    if best is None or option.relative_time < best.relative_time:
                        best = option
                    break  # smaller micro-batches only cost
        if best is not None:
            found.append(best)
    if not found and smallest is not None:
        raise UserError(
            f"--suggest: no layout of {num_gpus} GPUs fits into {MEMORY_IN_USE:.0%} of {memory_gib:g} GiB; "
            f"the smallest needs {smallest[0]:.1f} GiB: {smallest[1]}; take more GPUs"
        )
    if not found:
        raise UserError(f"--suggest: no layout of {num_gpus} GPUs is possible", *list(dict.fromkeys(problems))[:3])
    return sorted(found, key=lambda option: (option.relative_time, option.tensor * option.pipeline))[:most]


def _layouts(config: Config, num_gpus: int) -> Iterator[Config]:
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            if num_gpus % (tensor * pipeline):
                continue
            candidate = copy.deepcopy(config)
            data = num_gpus // (tensor * pipeline)
            candidate.parallel = replace(
                candidate.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=1, pipeline_layout=None,
                sequence=tensor > 1, world_size=num_gpus, distributed_optimizer=data > 1,
                overlap_grad_reduce=data > 1, overlap_param_gather=data > 1,
            )  # fmt: skip
            yield candidate


def _with(config: Config, recompute: str, shrink: int) -> Config:
    """With micro-batches halved ``shrink`` times, and no larger than the global batch leaves for each rank."""
    changed = copy.deepcopy(config)
    changed.parallel.recompute = recompute
    p = changed.parallel
    data = (p.world_size or 1) // (p.tensor * p.pipeline)
    for phase in changed.data.phases.values():
        wanted = max(1, phase.micro_batch_size >> shrink)
        share = phase.global_batch_size // data
        phase.micro_batch_size = max((m for m in range(1, wanted + 1) if share % m == 0), default=1) if share else 1
    return changed


def differences(changed: Config, config: Config) -> str:
    """Overrides that turn ``config`` into ``changed``."""
    before, after = (flatten(to_plain(c)) for c in (config, changed))
    changes = {key: value for key, value in after.items() if before.get(key, ...) != value}
    return " ".join(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in changes.items())


def _rate(plan: Plan, config: Config, gpu: str | None) -> Suggestion:
    p = plan.config.parallel
    heads = plan.config.model.num_attention_heads
    time = plan.balance
    time *= capacity(heads, p.tensor) * p.tensor / heads
    time *= 1 + TENSOR_COST * math.log2(p.tensor)
    time *= 1 + (RECOMPUTE_COST if p.recompute == "full" else 0)
    total = sum(phase.num_tokens for phase in plan.phases) or 1
    factor = 0.0
    for phase in plan.phases:
        rows = phase.micro_batch_size * phase.seq_length
        small = SMALL_COST * max(0.0, math.log2(SMALL_MICRO_BATCH_ROWS / rows))
        factor += phase.num_tokens / total * (1 + small) / (1 - phase.bubble_fraction)
    micro = tuple(phase.micro_batch_size for phase in plan.phases)
    memory = max(stage.total_bytes for stage in plan.memory) / 2**30
    days = estimate_times(plan, gpu)[0].days if gpu else None
    return Suggestion(
        p.tensor, p.pipeline, plan.data_parallel, micro, p.recompute, memory, time * (factor or 1.0),
        differences(plan.config, config), days,
    )  # fmt: skip
