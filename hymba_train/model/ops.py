"""The op backends of a model, chosen once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from hymba_train.config.schema import Config
from hymba_train.describe import ModelDims, kv_is_replicated, resolve_stack, used_mixers
from hymba_train.describe.attention_backends import check_attention
from hymba_train.describe.backends import asked_backends
from hymba_train.describe.saved import MOST_STATES
from hymba_train.errors import UserError
from hymba_train.ops import Choice, select


@dataclass(frozen=True)
class Ops:
    """Chosen backends; ``description`` is what a run prints."""

    attention: Choice
    selective_scan: Choice
    causal_conv_rows: Choice
    rms_norm: Choice
    add_rms_norm: Choice
    group_rms_norm: Choice
    normed_average: Choice
    swiglu: Choice
    rotate_heads: Choice
    linear_cross_entropy: Choice
    ssd_scan: Choice | None = None  # None in a model without layers that use it

    @property
    def description(self) -> str:
        chosen = (getattr(self, field.name) for field in fields(self))
        return "; ".join(choice.description for choice in chosen if choice is not None)


def select_ops(config: Config, device: torch.device, dtype: torch.dtype) -> Ops:
    """Backends for a run's device, precision, data and layout; ``dtype`` is that of the activations.

    Raises UserError, naming the nearest backend that can, if one asked for cannot do what the run needs.
    """
    dims, layers, asked = ModelDims.of(config.model), resolve_stack(config.model), asked_backends(config)
    row_wise = {"backward", "deterministic"} if config.run.deterministic else {"backward"}
    common = row_wise | {"segment_ids"} if config.data.document_mask else row_wise
    state = common | {"initial_state", "state_grad"}
    needs = dict.fromkeys(asked, row_wise) | {
        "attention": common | _if(kv_is_replicated(dims.num_kv_heads, config.parallel.tensor), "kv_index"),
        "selective_scan": state | _if(dims.state_dim > MOST_STATES, "wide_state"),
        "ssd_scan": state,
        "causal_conv_rows": common,
        "rotate_heads": row_wise | _if(dims.head_dim & (dims.head_dim - 1), "odd_width"),
    }
    if not any(mixer.ssd_sizes(config.model) for mixer in used_mixers(layers)):
        del asked["ssd_scan"]
    chosen = {op: select(op, name, device.type, needs=needs[op], dtype=dtype) for op, name in asked.items()}
    for op in ("swiglu", "normed_average"):
        if writes_fp8(config.precision.fp8, chosen[op].name):
            chosen[op] = replace(chosen[op], reason=f"{chosen[op].reason}; writes FP8")
    has_attention = any(layer.has_attention for layer in layers)
    problems = check_attention(config, chosen["attention"].name) if has_attention else []
    if problems:  # the plan says so where run.device is cuda
        raise UserError(*problems)
    return Ops(**chosen)


def writes_fp8(recipe: str | None, backend: str) -> bool:
    """Whether the kernels of SwiGLU and of the branches' mean cast what they make for a product: ``recipe``
    (precision.fp8) must know scales beforehand."""
    return recipe == "delayed" and backend == "triton"


def _if(condition: object, need: str) -> set[str]:
    return {need} if condition else set()
