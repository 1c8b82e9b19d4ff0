"""Every check of a configuration that can be made before a GPU is held.

Each function takes what it needs and returns problems, one line each: the fact that fails and the nearest value that
works. ``plan.make_plan`` calls them all and raises them together.
"""

from __future__ import annotations

import re

from hymba_train.config.nearest import did_you_mean, divisors_around, multiples_around, nearest
from hymba_train.config.schema import TO_BE_GIVEN, CheckpointConfig, Config, ModelConfig, PhaseConfig
from hymba_train.describe import LayerDescription, ModelDims, export_obstacles, resolve_stack, used_mixers
from hymba_train.describe.dims import inner_size_in_words
from hymba_train.plan.instruct import check_epochs
from hymba_train.plan.precision import check_fp8_rows
from hymba_train.plan.steps import batch_sizes

_NAME = re.compile(r"[\w.=+-]*[\w=+-][\w.=+-]*")  # more than dots


def check_model(model: ModelConfig) -> list[str]:
    """Shapes of the model. Expects given, positive numbers."""
    problems = []
    d, heads, groups = model.hidden_size, model.num_attention_heads, model.num_query_groups
    width = model.kv_channels or d // heads
    if d % heads and model.kv_channels is None:
        problems.append(
            f"model.num_attention_heads={heads} does not divide model.hidden_size={d}: {divisors_around(heads, d)}; "
            "or set model.kv_channels"
        )
    elif width % 2 and model.kv_channels:
        problems.append(f"model.kv_channels={width} is odd, RoPE turns pairs; set {width - 1} or {width + 1}")
    elif width % 2:
        problems.append(
            f"model.num_attention_heads={heads}: heads of {width} are odd, RoPE turns pairs; "
            f"choose a number of heads that leaves an even width"
        )
    elif width <= 2 and model.kv_channels and model.rope_type == "ntk":
        problems.append(f"model.kv_channels={width} is too narrow for rope_type=ntk; set at least 4")
    elif width <= 2 and model.rope_type == "ntk":
        problems.append(
            f"model.num_attention_heads={heads}: heads of {d // heads} are too narrow for rope_type=ntk; "
            f"choose {d // 4} at most"
        )
    if heads % groups:
        problems.append(
            f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}: "
            f"{divisors_around(groups, heads)}"
        )
    if len(set(model.global_layers)) < len(model.global_layers):
        problems.append(f"model.global_layers={model.global_layers}: a layer is named twice; name each once")
    if model.rope_original_max_positions > model.max_position_embeddings:
        problems.append(
            f"model.rope_original_max_positions={model.rope_original_max_positions} is more than "
            f"model.max_position_embeddings={model.max_position_embeddings}: set it to at most that"
        )
    try:
        layers = resolve_stack(model)
    except ValueError as error:
        return [*problems, str(error)]
    return problems or _check_branches(model, layers)


def _check_branches(model: ModelConfig, layers: list[LayerDescription]) -> list[str]:
    """Widths of branches against heads and each other."""
    problems, d = [], ModelDims.of(model)
    inner = inner_size_in_words(model)
    values_from_inner = model.v_head_dim is None and any(layer.has_attention for layer in layers)
    if d.inner_size % d.num_heads and (values_from_inner or any(layer.has_ssm for layer in layers)):
        problems.append(
            f"model.num_attention_heads={d.num_heads} does not divide {inner}, which heads share out among them: "
            f"{divisors_around(d.num_heads, d.inner_size)}"
        )
    elif d.attention_size != d.inner_size and model.branch_fusion == "mean" and "hybrid" in [x.mixer for x in layers]:
        problems.append(
            f"model.v_head_dim={model.v_head_dim} x model.num_attention_heads {d.num_heads} = {d.attention_size}, but "
            f"the SSM branch is {d.inner_size} wide and branch_fusion=mean needs equal widths: set "
            "model.v_head_dim=null or model.branch_fusion=concat"
        )
    return problems + [line for mixer in used_mixers(layers) for line in mixer.check_model(model)]


def check_layout(config: Config, world_size: int) -> list[str]:
    """Numbers of ranks and stages against the model and each other. Expects positive numbers."""
    p, m = config.parallel, config.model
    problems = []
    if p.context > 1:
        problems.append(f"parallel.context={p.context}: context parallelism is not supported yet; set it to 1")
    if p.tensor > m.num_attention_heads:
        problems.append(
            f"parallel.tensor={p.tensor} is more than model.num_attention_heads={m.num_attention_heads}: "
            f"every rank needs a head; set parallel.tensor to at most {m.num_attention_heads}"
        )
    if p.sequence and p.tensor == 1:
        problems.append("parallel.sequence=true needs parallel.tensor of at least 2; set parallel.sequence=false")
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline={p.virtual_pipeline} needs parallel.pipeline of at least 2; "
            "set parallel.virtual_pipeline=1"
        )
    if p.overlap_param_gather and not p.distributed_optimizer:
        problems.append(
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true; set that, or leave it off"
        )
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        problems.append(
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true; set that, or leave it off"
        )
    if p.world_size is not None and p.world_size != world_size:
        problems.append(
            f"parallel.world_size={p.world_size}, but {_processes(world_size)}: start {p.world_size}, "
            f"or set parallel.world_size={world_size}"
        )
    ranks = p.tensor * p.pipeline
    if world_size % ranks:
        problems.append(
            f"{_processes(world_size)}, no multiple of parallel.tensor {p.tensor} x parallel.pipeline {p.pipeline} = "
            f"{ranks}: {multiples_around(world_size, ranks)}"
        )
    return problems + _check_chunks(config)


def check_cut(config: Config) -> list[str]:
    """What the mixers ask of tensor parallelism. Expects a possible model."""
    tp, mixers = config.parallel.tensor, used_mixers(resolve_stack(config.model))
    return [] if tp == 1 else [line for mixer in mixers for line in mixer.check_layout(config.model, tp)]


def _processes(world_size: int) -> str:
    return "1 process runs" if world_size == 1 else f"{world_size} processes run"


def _check_chunks(config: Config) -> list[str]:
    p, num_layers = config.parallel, config.model.num_layers
    num_chunks = p.pipeline * p.virtual_pipeline
    chunks = f"parallel.pipeline {p.pipeline} x parallel.virtual_pipeline {p.virtual_pipeline} = {num_chunks} chunks"
    layout = p.pipeline_layout
    if layout is None:
        if num_chunks > num_layers:
            return [f"{chunks} for model.num_layers={num_layers}: some would be empty; {num_layers} at most"]
        return []
    problems = []
    if len(layout) != num_chunks:
        problems.append(f"parallel.pipeline_layout has {len(layout)} entries for {chunks}; give {num_chunks} or null")
    if any(count < 1 for count in layout):
        problems.append(f"parallel.pipeline_layout={layout}: every chunk needs a layer; give 1 or more everywhere")
    if sum(layout) != num_layers:
        problems.append(
            f"parallel.pipeline_layout={layout} adds up to {sum(layout)} layers, model.num_layers is {num_layers}; "
            f"{'add' if sum(layout) < num_layers else 'take away'} {abs(num_layers - sum(layout))}, or set null"
        )
    return problems


def check_schedule(config: Config) -> list[str]:
    """Learning-rate schedule."""
    s, problems = config.schedule, []
    if config.optim.min_lr > config.optim.lr:
        problems.append(
            f"optim.min_lr={config.optim.min_lr} is above optim.lr={config.optim.lr}: set it to at most optim.lr"
        )
    if s.lr_decay_style == "wsd" and s.lr_warmup_fraction + s.lr_wsd_decay_fraction > 1:
        problems.append(
            f"schedule.lr_warmup_fraction={s.lr_warmup_fraction} and schedule.lr_wsd_decay_fraction="
            f"{s.lr_wsd_decay_fraction} add up to more than 1: lower one by "
            f"{s.lr_warmup_fraction + s.lr_wsd_decay_fraction - 1:.4g}"
        )
    if s.lr_decay_style == "wsd" and s.lr_wsd_decay_style == "exponential" and not config.optim.min_lr > 0:
        problems.append(
            "optim.min_lr=0 is never reached by schedule.lr_wsd_decay_style=exponential; set optim.min_lr above 0"
        )
    return problems


def check_run(config: Config) -> list[str]:
    """Words with a form of their own: the run's name, which becomes a directory below run.directory, and the steps to
    profile."""
    problems, name = [], config.run.name
    if name != TO_BE_GIVEN and not all(_NAME.fullmatch(part) for part in name.split("/")):
        problems.append(
            f"run.name={name}: use letters, digits and . _ = + - only, as it becomes a directory: a1, or ablation/a1"
        )
    if config.logging.profile is not None:
        start, _, end = config.logging.profile.partition(":")
        if not (start.isdigit() and end.isdigit() and int(start) < int(end)):
            problems.append(f"logging.profile={config.logging.profile!r}: write START:END, START < END, e.g. '10:13'")
    return problems


def phase_is_given(phase: PhaseConfig) -> bool:
    """Whether the numbers that make steps are all there."""
    return TO_BE_GIVEN not in (phase.tokens, phase.seq_length, phase.global_batch_size, phase.micro_batch_size)


def check_phase(config: Config, name: str, phase: PhaseConfig, data_parallel: int | None) -> list[str]:
    """One phase: batch sizes, ramp-up, sequence length, blend. ``data_parallel`` None: the layout is wrong already."""
    key = f"data.phases.{name}"
    problems = _check_blend(config, key, phase) + check_epochs(key, phase)
    if not phase_is_given(phase):
        return problems
    problems += _check_length(config, key, phase)
    ramp = _check_rampup(key, phase)
    if ramp:
        return problems + ramp
    if phase.tokens < phase.seq_length * batch_sizes(phase)[0]:
        problems.append(
            f"{key}.tokens={phase.tokens} is less than one step of {phase.seq_length * batch_sizes(phase)[0]} tokens: "
            "make the phase longer or the batch smaller"
        )
    if data_parallel is None:
        return problems
    sizes = batch_sizes(phase)
    whole = phase.micro_batch_size * data_parallel
    factors = f"{key}.micro_batch_size {phase.micro_batch_size} x {data_parallel} data-parallel ranks"
    if config.parallel.virtual_pipeline > 1:
        # The interleaved schedule passes micro-batches round in groups of one per pipeline stage.
        whole *= config.parallel.pipeline
        factors += f" x {config.parallel.pipeline} pipeline stages (interleaved schedule)"
    for size in sizes:
        if size % whole:
            where = f"{key}.rampup_batch_size: batch size {size}"
            if size == phase.global_batch_size:
                where = f"{key}.global_batch_size={size}"
            problems.append(f"{where} is not a multiple of {factors} = {whole}: {multiples_around(size, whole)}")
    return problems


def _check_length(config: Config, key: str, phase: PhaseConfig) -> list[str]:
    model = config.model
    problems = []
    rope = phase.rope_type or model.rope_type
    limit_key = "max_position_embeddings" if rope == "ntk" else "rope_original_max_positions"
    limit = getattr(model, limit_key)
    if phase.seq_length > limit:
        ntk_would_do = rope == "default" and phase.seq_length <= model.max_position_embeddings
        problems.append(
            f"{key}.seq_length={phase.seq_length} is beyond model.{limit_key}={limit}, the end of rope_type={rope}: "
            f"set {f'{key}.rope_type=ntk or ' if ntk_would_do else ''}{key}.seq_length to at most {limit}"
        )
    problems += check_fp8_rows(config, key, phase)
    return problems


def _check_rampup(key: str, phase: PhaseConfig) -> list[str]:
    ramp = phase.rampup_batch_size
    if ramp is None:
        return []
    name = f"{key}.rampup_batch_size={ramp}"
    if len(ramp) != 3 or any(value < 1 for value in ramp):
        return [f"{name}: give [start, increment, tokens], all at least 1"]
    start, increment, tokens = ramp
    if start >= phase.global_batch_size:
        whole = f"{key}.global_batch_size={phase.global_batch_size}"
        return [f"{name} starts at {start}, not below {whole}: start lower, or set null"]
    problems = []
    distance = phase.global_batch_size - start
    if distance % increment:
        problems.append(
            f"{name}: steps of {increment} from {start} do not meet {key}.global_batch_size={phase.global_batch_size}; "
            f"increments that divide {distance}: {divisors_around(increment, distance)}"
        )
    if tokens > phase.tokens:
        problems.append(f"{name}: the ramp is longer than {key}.tokens={phase.tokens}; give at most that")
    return problems


def _check_blend(config: Config, key: str, phase: PhaseConfig) -> list[str]:
    if not phase.blend:
        others = [other for other, given in config.data.phases.items() if given is not phase and given.blend]
        meant = nearest(key.rpartition(".")[2], others)
        if meant is not None and phase.seq_length == TO_BE_GIVEN:
            return [f"{key}: a new phase without a blend; did you mean data.phases.{meant}?"]
        return [f"{key}.blend is empty: give at least one source and weight, e.g. {key}.blend.books=1.0"]
    sources = config.data.sources
    return [
        f"{key}.blend.{name}: there is no data.sources.{name}; {did_you_mean(name, sources, 'sources')}"
        for name in phase.blend
        if name not in sources
    ]


def check_checkpoint(checkpoint: CheckpointConfig) -> list[str]:
    """Exports are made from checkpoints."""
    if checkpoint.export_interval is not None and not checkpoint.enabled:
        return [
            f"checkpoint.export_interval={checkpoint.export_interval} needs checkpoints: set checkpoint.enabled=true, "
            "or checkpoint.export_interval=null"
        ]
    return []


def check_export(config: Config) -> list[str]:
    """A model that the Hugging Face format cannot express is not exported while it trains. Expects a possible model."""
    interval = config.checkpoint.export_interval
    if interval is None:
        return []
    return [
        f"{line}; set checkpoint.export_interval=null (it is {interval})" for line in export_obstacles(config.model)
    ]
