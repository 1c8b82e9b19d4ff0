"""Layer specs: which modules a layer is built from, on a CPU and on a GPU."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec

from hymba_train.errors import UserError
from hymba_train.model.ffn import FfnSubmodules, GatedFfn
from hymba_train.model.layer import HymbaLayer, HymbaLayerSubmodules
from hymba_train.model.mixer import LayerMixer, MixerSubmodules
from hymba_train.model.norm import RMSNorm


def layer_spec(name: str, device_type: str, dtype: torch.dtype) -> ModuleSpec:
    """Spec of a HymbaLayer; ``name``: precision.layer_spec. ``auto`` is transformer_engine for bf16 on a GPU, else
    local: Transformer Engine computes float32 products in TF32.

    Raises UserError where Transformer Engine is asked for and is not installed.
    """
    if name == "auto":
        name = "transformer_engine" if device_type == "cuda" and dtype is torch.bfloat16 else "local"
    column, row = (ColumnParallelLinear, RowParallelLinear) if name == "local" else _transformer_engine_linears()
    mixer = ModuleSpec(LayerMixer, submodules=MixerSubmodules(in_proj=column, out_proj=row))
    ffn = ModuleSpec(GatedFfn, submodules=FfnSubmodules(linear_fc1=column, linear_fc2=row))
    return ModuleSpec(HymbaLayer, submodules=HymbaLayerSubmodules(norm=RMSNorm, mixer=mixer, ffn=ffn))


def _transformer_engine_linears() -> tuple[type, type]:
    try:
        import transformer_engine.pytorch  # noqa: F401
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    except ImportError as missing:
        raise UserError(
            f"precision.layer_spec=transformer_engine, but it cannot be imported ({missing}): "
            "install hymba-train[gpu], or use precision.layer_spec=local"
        ) from missing
    return TEColumnParallelLinear, TERowParallelLinear
