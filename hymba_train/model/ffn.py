"""Gated FFN: down(SiLU(gate(x)) * up(x)), no biases (hymba-architecture 2.10)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from hymba_train.model.config import HymbaConfig
from hymba_train.model.ops import writes_fp8
from hymba_train.ops import float8


@dataclass
class FfnSubmodules:
    """Linear layers of an FFN: local (CPU) or Transformer Engine."""

    linear_fc1: ModuleSpec | type = None
    linear_fc2: ModuleSpec | type = None


class GatedFfn(MegatronModule):
    """linear_fc1 holds gate and up rows of this rank, in this order; padding columns stay zero by themselves."""

    def __init__(self, config: HymbaConfig, submodules: FfnSubmodules, swiglu_op, pg_collection) -> None:
        super().__init__(config)
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
        in_fp8 = writes_fp8(config.fp8 and config.fp8_recipe, swiglu_op.name)
        self.swiglu_op = partial(_swiglu_between, self.linear_fc1, self.linear_fc2) if in_fp8 else swiglu_op

    def forward(self, hidden: Tensor) -> Tensor:
        """[N(/TP), 1, D] -> same."""
        return self.linear_fc2(self.swiglu_op(self.linear_fc1(hidden)[0]))[0]


def _swiglu_between(linear_fc1, linear_fc2, gate_up: Tensor) -> Tensor:
    """SwiGLU of linear_fc1's output for linear_fc2, both Transformer Engine's with delayed scaling: result and gradient
    in FP8, by the scales that these products would cast them with themselves."""
    from hymba_train.ops.swiglu_triton import swiglu_triton_fp8

    return swiglu_triton_fp8(gate_up, float8.of_input(linear_fc2), float8.of_gradient(linear_fc1))
