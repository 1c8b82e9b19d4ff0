"""The op backends of a model, chosen once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hymba_train.config.schema import Config
from hymba_train.ops import Choice, select


@dataclass(frozen=True)
class Ops:
    """Chosen backends; ``description`` is what a run prints."""

    attention: Choice
    selective_scan: Choice
    causal_conv: Choice

    @property
    def description(self) -> str:
        return "; ".join(c.description for c in (self.attention, self.selective_scan, self.causal_conv))


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
    return Ops(
        attention=select(
            "attention", p.attention_backend, kind, needs=common | ({"kv_index"} if uneven_kv else set()), dtype=dtype
        ),
        selective_scan=select(
            "selective_scan", p.scan_backend, kind, needs=state | ({"wide_state"} if wide else set()), dtype=dtype
        ),
        causal_conv=select("causal_conv", p.conv_backend, kind, needs=state, dtype=dtype),
    )
