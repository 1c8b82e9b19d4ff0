"""The plan of a run: checked, and spelled out layer by layer, stage by stage, phase by phase. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hymba_train.config.choices import check_values
from hymba_train.config.document import meaning_of
from hymba_train.config.schema import Config
from hymba_train.config.typed import to_be_given
from hymba_train.describe import (
    LayerDescription,
    ModelDims,
    capacity,
    flops_per_token,
    kv_is_replicated,
    layer_tensors,
    model_tensors,
    resolve_stack,
)
from hymba_train.describe.dims import effective_rotary_base
from hymba_train.describe.flops import BACKWARD_FACTOR, head_flops, layer_flops
from hymba_train.errors import UserError
from hymba_train.plan import checks
from hymba_train.plan.graph import check_cuda_graph
from hymba_train.plan.instruct import check_conversations, check_objective, fill_in_epochs
from hymba_train.plan.memory import StageMemory, stage_memory
from hymba_train.plan.paths import check_cache, check_files
from hymba_train.plan.precision import check_precision
from hymba_train.plan.recall import check_recall
from hymba_train.plan.stages import Border, Chunk, balance, bubble_fraction, make_borders, make_chunks
from hymba_train.plan.steps import StepPlan, plan_steps


@dataclass(frozen=True)
class LayerPlan:
    """One row of the layer table."""

    description: LayerDescription
    chunk: int  # in the order of the layers
    pipeline_rank: int
    virtual_rank: int
    num_parameters: int  # true ones, without padding
    flops_per_token: float  # forward


@dataclass(frozen=True)
class PhasePlan:
    """One training phase in numbers."""

    name: str
    num_steps: int
    num_tokens: int  # text tokens really trained: full batches only
    tokens_left_over: int  # of the phase's tokens, too few for a full batch
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    num_micro_batches: int  # per step and data-parallel rank, at the full batch size
    tokens_per_step: int  # at the full batch size
    rotary_base: float  # effective
    flops: dict[str, float]  # forward FLOPs per text token, by part
    bubble_fraction: float
    padding_rows: int  # zero rows added so that sequence parallelism can cut the tokens evenly

    @property
    def training_flops_per_token(self) -> float:
        return BACKWARD_FACTOR * sum(self.flops.values())


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a GPU is held. Made by :func:`make_plan`."""

    config: Config
    world_size: int
    data_parallel: int
    layers: tuple[LayerPlan, ...]
    chunks: tuple[Chunk, ...]  # in the order of the layers
    borders: tuple[Border, ...]
    balance: float  # FLOPs of the busiest pipeline rank over the mean of all, output layer included
    memory: tuple[StageMemory, ...]  # one a pipeline rank
    num_parameters: int  # true ones; tied embeddings count once
    flops: dict[str, float]  # forward FLOPs per text token by part, at planning_seq_length
    planning_seq_length: int
    phases: tuple[PhasePlan, ...]  # those whose numbers are all given
    steps: StepPlan | None  # None while a phase lacks numbers, or there is none
    to_be_given: tuple[str, ...]  # dotted keys only the user knows
    notes: tuple[str, ...]  # worth knowing, not wrong

    def require_complete(self) -> None:
        """What ``train`` asks for beyond ``plan``: nothing is left to be given. Raises UserError, one line a key."""
        if self.to_be_given:
            raise UserError(*(f"{key}: to be given ({meaning_of(key).rstrip('.')})" for key in self.to_be_given))


def make_plan(
    config: Config, world_size: int | None = None, check_paths: bool = True, needs_reference: bool = True
) -> Plan:
    """Check a configuration and spell it out.

    world_size: processes of the run; None takes parallel.world_size, or as many as one model replica needs.
    check_paths: whether files that are named must exist (off for planning away from the machine that has them). Also
        gives ``config`` the length of phases of whole epochs.
    needs_reference: whether DPO's reference log-probabilities must be there, too (off for making them).

    Raises UserError with one line for every problem there is.
    """
    if check_paths:
        fill_in_epochs(config)
    problems = _all_problems(config, world_size, check_paths, needs_reference)
    if problems:
        raise UserError(*problems)
    return _spell_out(config, world_size or _default_world_size(config))


def _default_world_size(config: Config) -> int:
    return config.parallel.world_size or config.parallel.tensor * config.parallel.pipeline


def _all_problems(config: Config, world_size: int | None, check_paths: bool, needs_reference: bool) -> list[str]:
    problems = check_values(config)
    wrong = {line.partition(".")[0] for line in problems}  # later checks rely on single values being possible

    def fine(*groups: str) -> bool:
        return not wrong.intersection(groups)

    data_parallel, model_problems = None, []
    if fine("model"):
        problems += (model_problems := checks.check_model(config.model))
    if fine("model", "parallel"):
        world_size = world_size or _default_world_size(config)
        problems += checks.check_layout(config, world_size)
        ranks = config.parallel.tensor * config.parallel.pipeline
        data_parallel = world_size // ranks if world_size % ranks == 0 else None
        problems += [] if model_problems else checks.check_cut(config)
    if fine("model", "parallel", "precision") and not model_problems:
        problems += check_precision(config)
    if fine("optim", "schedule"):
        problems += checks.check_schedule(config)
    if fine("checkpoint"):
        problems += checks.check_checkpoint(config.checkpoint)
    if fine("checkpoint", "model") and not model_problems:
        problems += checks.check_export(config)
    if fine("model", "parallel"):
        for name, phase in config.data.phases.items():
            if not any(line.startswith(f"data.phases.{name}.") for line in problems):
                problems += checks.check_phase(config, name, phase, data_parallel)
    if fine("model", "evaluation"):
        problems += check_recall(config)
    problems += checks.check_run(config) + check_cache(config)
    if fine("run"):
        problems += check_objective(config) + check_cuda_graph(config, data_parallel)
    if check_paths:
        problems += check_files(config)
        problems += check_conversations(config, needs_reference) if fine("run") else []
    return problems


def _spell_out(config: Config, world_size: int) -> Plan:
    model, p = config.model, config.parallel
    data_parallel = world_size // (p.tensor * p.pipeline)
    layers = resolve_stack(model)
    given = {name: phase for name, phase in config.data.phases.items() if checks.phase_is_given(phase)}
    complete = bool(given) and len(given) == len(config.data.phases)
    longest = max(given.values(), key=lambda phase: phase.tokens, default=None)
    seq_length = longest.seq_length if longest else model.rope_original_max_positions
    costs = [sum(layer_flops(model, layer, seq_length).values()) for layer in layers]
    counts = p.pipeline_layout or balance(layers, p.pipeline * p.virtual_pipeline, costs, head_flops(model))
    chunks = make_chunks(counts, p.pipeline, costs, head_flops(model))
    dims = ModelDims.of(model)
    kv_width = dims.num_kv_heads * (dims.head_dim + dims.value_head_dim)
    borders = tuple(make_borders(layers, chunks, kv_width))
    message_width = model.hidden_size + max((b.kv_width for b in borders), default=0)
    per_rank = [sum(c.flops_per_token for c in chunks if c.pipeline_rank == r) for r in range(p.pipeline)]
    steps = plan_steps(given) if complete else None
    phases = tuple(_phase_plan(config, name, data_parallel) for name in given)
    return Plan(
        config=config,
        world_size=world_size,
        data_parallel=data_parallel,
        layers=tuple(_layer_plans(config, layers, chunks, costs)),
        chunks=tuple(chunks),
        borders=borders,
        balance=max(per_rank) * p.pipeline / sum(per_rank),
        memory=tuple(stage_memory(config, layers, chunks, data_parallel, list(given.values()), message_width)),
        num_parameters=sum(t.num_parameters for t in model_tensors(model)),
        flops=flops_per_token(model, seq_length),
        planning_seq_length=seq_length,
        phases=phases,
        steps=steps,
        to_be_given=tuple(_missing(config)),
        notes=tuple(_notes(config, dims, phases, steps)),
    )


def _layer_plans(
    config: Config, layers: Sequence[LayerDescription], chunks: Sequence[Chunk], costs: Sequence[float]
) -> list[LayerPlan]:
    return [
        LayerPlan(
            layers[index], chunk.index, chunk.pipeline_rank, chunk.virtual_rank,
            sum(t.num_parameters for t in layer_tensors(config.model, layers[index])), costs[index],
        )
        for chunk in chunks
        for index in chunk.layers
    ]  # fmt: skip


def _phase_plan(config: Config, name: str, data_parallel: int) -> PhasePlan:
    p, phase = config.parallel, config.data.phases[name]
    steps = plan_steps({name: phase})
    num_micro_batches = phase.global_batch_size // (phase.micro_batch_size * data_parallel)
    rows = config.model.num_meta_tokens + phase.micro_batch_size * phase.seq_length
    return PhasePlan(
        name=name,
        num_steps=steps.num_steps,
        num_tokens=steps.num_tokens,
        tokens_left_over=phase.tokens - steps.num_tokens,
        seq_length=phase.seq_length,
        global_batch_size=phase.global_batch_size,
        micro_batch_size=phase.micro_batch_size,
        num_micro_batches=num_micro_batches,
        tokens_per_step=phase.global_batch_size * phase.seq_length,
        rotary_base=effective_rotary_base(config.model, phase.rope_type),
        flops=flops_per_token(config.model, phase.seq_length),
        bubble_fraction=bubble_fraction(p.pipeline, p.virtual_pipeline, num_micro_batches),
        padding_rows=-rows % p.tensor if p.sequence else 0,
    )


def _missing(config: Config) -> list[str]:
    keys = to_be_given(config)
    if not config.data.phases:
        keys.append("data.phases")
    if not config.data.sources:
        keys.append("data.sources")
    return keys


def _notes(config: Config, dims: ModelDims, phases: tuple[PhasePlan, ...], steps: StepPlan | None) -> list[str]:
    p, notes = config.parallel, []
    padded = capacity(dims.num_heads, p.tensor) * p.tensor
    if padded > dims.num_heads:
        notes.append(
            f"tensor parallelism pads {dims.num_heads} heads to {padded}: "
            f"{padded / dims.num_heads - 1:.0%} more work in attention and SSM"
        )
    if kv_is_replicated(dims.num_kv_heads, p.tensor):
        notes.append(f"{dims.num_kv_heads} KV heads do not divide over {p.tensor} ranks: every rank holds all of them")
    for phase in phases:
        if phase.padding_rows:
            notes.append(f"phase {phase.name}: {phase.padding_rows} zero rows a micro-batch, for sequence parallelism")
        if phase.tokens_left_over * 1000 > phase.num_tokens:
            notes.append(
                f"phase {phase.name}: {phase.tokens_left_over:,} tokens at its end do not fill a batch and are left out"
            )
    used = {name for phase in config.data.phases.values() for name in phase.blend}
    for name, source in config.data.sources.items():
        if config.data.phases and name not in used:
            validation = "for validation only" if source.validation_fraction else "not used at all"
            notes.append(f"data.sources.{name} is in no phase's blend: {validation}")
    stop = config.run.train_steps
    if steps is not None and stop is not None:
        if stop < steps.num_steps:
            notes.append(f"run.train_steps={stop:,} of {steps.num_steps:,}: stops early; schedules keep their length")
        elif stop > steps.num_steps:
            notes.append(f"run.train_steps={stop:,} is more than the phases have: the run ends at {steps.num_steps:,}")
    return notes
