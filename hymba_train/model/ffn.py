"""Gated FFN: down(SiLU(gate(x)) * up(x)), no biases (hymba-architecture 2.10)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from hymba_train.model.config import HymbaConfig


@dataclass
class FfnSubmodules:
    """Linear layers of an FFN: local (CPU) or Transformer Engine."""

    linear_fc1: ModuleSpec | type = None
    linear_fc2: ModuleSpec | type = None


class GatedFfn(MegatronModule):
    """linear_fc1 holds gate and up rows of this rank, in this order; padding columns stay zero by themselves."""

    def __init__(self, config: HymbaConfig, submodules: FfnSubmodules, swiglu_op, pg_collection) -> None:
        super().__init__(config)
        self.swiglu_op = swiglu_op
        linear = dict(
            config=config, init_method=None, bias=False, skip_bias_add=False, is_expert=False, tp_group=pg_collection.tp
        )
        width = config.ffn_hidden_size  # padded to a multiple of the tensor-parallel size
        self.linear_fc1 = build_module(
            submodules.linear_fc1, config.hidden_size, 2 * width, gather_output=False, **linear
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2, width, config.hidden_size, input_is_parallel=True, **linear
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[N(/TP), 1, D] -> same."""
        return self.linear_fc2(self.swiglu_op(self.linear_fc1(hidden)[0]))[0]
