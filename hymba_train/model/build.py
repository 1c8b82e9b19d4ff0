"""From a configuration to the model chunks of one rank, with their initial values."""

from __future__ import annotations

import torch

from hymba_train.config.schema import Config
from hymba_train.describe.dims import effective_rotary_base
from hymba_train.model.config import hymba_config
from hymba_train.model.init import initial_value
from hymba_train.model.layer_specs import layer_spec
from hymba_train.model.model import HymbaModel
from hymba_train.model.ops import select_ops
from hymba_train.parallel.runtime import Runtime


def build_model_chunks(
    config: Config, runtime: Runtime, chunks: list[range], device: torch.device | None = None
) -> list[HymbaModel]:
    """This rank's chunks, in the order of its virtual stages, initialised.

    Args:
        chunks: layer ranges of all chunks of the model, in the order of the layers (``Plan.chunks``); chunk c
            belongs to pipeline rank c % PP.
        device: where to build; 'meta' gives shapes only, without initial values. None: the runtime's device.
    """
    device = device or runtime.device
    transformer = hymba_config(config, runtime.device)
    ops = select_ops(config, runtime.device, transformer.params_dtype)
    spec = layer_spec(config.precision.layer_spec, runtime.device.type, transformer.params_dtype)
    mine = chunks[runtime.pipeline_rank :: runtime.pipeline_size]
    built = []
    for virtual_stage, layer_range in enumerate(mine):
        with torch.device(device):
            model = HymbaModel(
                transformer, spec, ops, layer_range, [c.start for c in chunks], runtime.groups,
                rotary_base=effective_rotary_base(config.model), recompute=config.parallel.recompute == "full",
                vp_stage=virtual_stage if len(mine) > 1 else None,
            )  # fmt: skip
        if device.type != "meta":
            initialize(model, config.run.seed)
        built.append(model)
    return built


@torch.no_grad()
def initialize(model: HymbaModel, seed: int) -> None:
    """Set every parameter from (seed, name); tensor-parallel ranks take their parts of the same values."""
    for _, param, description, cut in model.described_parameters():
        full = initial_value(model.config.model, description, seed)
        param.copy_(cut.take(full))
