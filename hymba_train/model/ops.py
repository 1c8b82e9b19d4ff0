"""The op backends of a model, chosen once."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from hymba_train.config.schema import Config
from hymba_train.describe import ModelDims, resolve_stack, used_mixers
from hymba_train.describe.attention_backends import check_attention
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
    ssd_scan: Choice | None  # None in a model without layers that use it

    @property
    def description(self) -> str:
        chosen = (getattr(self, field.name) for field in fields(self))
        return "; ".join(choice.description for choice in chosen if choice is not None)


def select_ops(config: Config, device: torch.device, dtype: torch.dtype, uneven_kv: bool) -> Ops:
    """Backends for a run's device, precision, data and layout.

    Raises UserError, naming the nearest backend that can, if one asked for cannot do what the run needs.
    """
    p, kind = config.precision, device.type
    common = {"backward"}
    if config.data.document_mask:
        common |= {"segment_ids"}
    if config.run.deterministic:
        common |= {"deterministic"}
    state = common | {"initial_state", "state_grad"}
    wide = config.model.mamba_state_dim > 16
    needs = common - {"segment_ids"}
    dk = ModelDims.of(config.model).head_dim
    of_op = {"rotate_heads": {"odd_width"}} if dk & (dk - 1) else {}
    has_ssd = any(mixer.ssd_sizes(config.model) for mixer in used_mixers(resolve_stack(config.model)))
    row_wise = {
        "rms_norm": p.norm_backend,
        "add_rms_norm": p.norm_backend,
        "group_rms_norm": p.norm_backend,
        "normed_average": p.norm_backend,
        "swiglu": p.swiglu_backend,
        "rotate_heads": p.rope_backend,
        "linear_cross_entropy": p.loss_backend,
    }
    attention = select(
        "attention", p.attention_backend, kind, needs=common | ({"kv_index"} if uneven_kv else set()), dtype=dtype
    )
    has_attention = any(layer.has_attention for layer in resolve_stack(config.model))
    problems = check_attention(config, attention.name) if has_attention else []
    if problems:  # the plan says so where run.device is cuda
        raise UserError(*problems)
    return Ops(
        attention=attention,
        selective_scan=select(
            "selective_scan", p.scan_backend, kind, needs=state | ({"wide_state"} if wide else set()), dtype=dtype
        ),
        causal_conv_rows=select("causal_conv_rows", p.conv_backend, kind, needs=common, dtype=dtype),
        ssd_scan=select("ssd_scan", p.ssd_backend, kind, needs=state, dtype=dtype) if has_ssd else None,
        **{
            op: select(op, name, kind, needs=needs | of_op.get(op, set()), dtype=dtype) for op, name in row_wise.items()
        },
    )
