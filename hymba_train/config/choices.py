"""Values that a key may take: words from a list, numbers within bounds. NAME in a key stands for any name."""

from __future__ import annotations

import math
from typing import Any

from hymba_train.config.decays import DECAYS, STYLES
from hymba_train.config.nearest import nearest
from hymba_train.config.recall_kinds import RECALL_KINDS
from hymba_train.config.schema import TO_BE_GIVEN, Config
from hymba_train.config.typed import flatten, to_plain, with_name

CHOICES: dict[str, tuple[str, ...]] = {
    "model.rope_type": ("default", "ntk"),
    "model.branch_fusion": ("mean", "concat"),
    "model.init_method": ("mamba", "published"),
    "parallel.recompute": ("none", "full"),
    "precision.params": ("float32", "bf16"),
    "precision.fp8": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "precision.layer_spec": ("local", "transformer_engine", "auto"),
    "optim.name": ("adamw",),
    "schedule.lr_decay_style": STYLES,
    "schedule.lr_wsd_decay_style": tuple(DECAYS),
    "data.phases.NAME.rope_type": ("default", "ntk"),
    "checkpoint.export_dtype": ("bfloat16", "float32"),
    "data.phases.NAME.packing": ("concat", "best_fit", "length_buckets"),
    "evaluation.recall.NAME.kind": tuple(RECALL_KINDS),
    "guards.on_data": ("skip", "rewind", "stop"),
    "guards.on_persistent": ("skip", "rewind", "stop"),
    "run.objective": ("pretrain", "sft", "dpo"),
    "run.device": ("auto", "cpu", "cuda"),
}
"""Words. null is allowed wherever the schema allows it."""

FROM_1, FROM_0 = (1, math.inf), (0, math.inf)
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "model.num_meta_tokens", "model.init_method_std", "optim.min_lr", "optim.weight_decay", "optim.clip_grad",
            "checkpoint.save_interval", "checkpoint.keep_every", "checkpoint.export_interval", "logging.eval_interval",
            "evaluation.recall_interval", "evaluation.recall_seed", "run.seed", "data.phases.NAME.min_document_tokens",
            "guards.spike_sigmas", "guards.loss_spike_nats",
            "guards.max_skips", "guards.max_rewinds", "guards.rewind_skip_steps", "guards.drift_interval",
        ),
        FROM_0,
    ),
    **dict.fromkeys(("guards.grad_spike_ratio", "guards.straggler_ratio"), FROM_1),
    "evaluation.recall_symbols": (2, math.inf),
    **dict.fromkeys(("schedule.lr_warmup_fraction", "schedule.lr_wsd_decay_fraction"), (0, 1)),
}  # fmt: skip
"""Smallest and largest value, both allowed. A whole number that is not named here is at least 1."""

POSITIVE = (
    "model.rotary_base", "model.layernorm_epsilon", "optim.lr", "optim.adam_eps", "data.phases.NAME.blend.NAME",
    "guards.hang_seconds", "guards.hang_slow_seconds", "optim.dpo_beta",
)  # fmt: skip
"""Numbers that must be above 0."""

BELOW_1 = ("optim.adam_beta1", "optim.adam_beta2", "data.sources.NAME.validation_fraction")
"""Numbers with 0 <= value < 1."""


MAY_BE_OPEN = (
    "model.name", "data.tokenizer", "data.path", "data.sources.NAME.path", "data.phases.NAME.tokens",
    "data.phases.NAME.seq_length", "data.phases.NAME.global_batch_size", "data.phases.NAME.micro_batch_size",
    "checkpoint.load", "logging.wandb_project", "logging.wandb_entity", "run.name", "run.directory",
)  # fmt: skip
"""Keys that a plan can do without: ``"???"`` there is listed as 'to be given'. Anywhere else it is a problem."""


def check_values(config: Config) -> list[str]:
    """One line for every value that its key cannot take, whatever the other keys say."""
    problems = []
    for key, value in flatten(to_plain(config)).items():
        pattern = with_name(key)
        if value == TO_BE_GIVEN and pattern not in MAY_BE_OPEN:
            problems.append(f"{key}: to be given; nothing can be planned without it")
        if value is None or value == TO_BE_GIVEN:
            continue
        problem = _check_value(pattern, value)
        if problem:
            problems.append(f"{key}={value}: {problem}")
    return problems


def choices_of(key: str) -> tuple[str, ...]:
    """Words that a dotted key may take; none where it takes others."""
    return CHOICES.get(with_name(key), ())


def _check_value(key: str, value: Any) -> str | None:
    if key in CHOICES and value not in CHOICES[key]:
        match = nearest(value, CHOICES[key])
        return f"not one of {', '.join(CHOICES[key])}" + (f"; did you mean {match}?" if match else "")
    bounds = BOUNDS.get(key, FROM_1 if type(value) is int else None)
    if bounds:
        low, high = bounds
        if not low <= value <= high:
            return f"must be at least {low}" if high == math.inf else f"must lie in {low}..{high}"
    if key in POSITIVE and not value > 0:
        return "must be above 0"
    if key in BELOW_1 and not 0 <= value < 1:
        return "must be at least 0 and below 1"
    return None
