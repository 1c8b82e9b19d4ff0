"""Gated FFN: down(SiLU(gate(x)) * up(x)), no biases (hymba-architecture 2.10)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from hymba_train.model.config import HymbaConfig
from hymba_train.model.ops import swiglu_writes_fp8


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
        in_fp8 = swiglu_writes_fp8(config.fp8_recipe if config.fp8 else None, swiglu_op.name)
        self.swiglu_op = partial(_swiglu_between, self.linear_fc1, self.linear_fc2) if in_fp8 else swiglu_op

    def forward(self, hidden: Tensor) -> Tensor:
        """[N(/TP), 1, D] -> same."""
        return self.linear_fc2(self.swiglu_op(self.linear_fc1(hidden)[0]))[0]


def _swiglu_between(linear_fc1, linear_fc2, gate_up: Tensor) -> Tensor:
    """SwiGLU of linear_fc1's output for linear_fc2, both Transformer Engine's with delayed scaling: result and gradient
    in FP8, by the scales that these products would cast them with themselves."""
    from transformer_engine.pytorch.constants import FP8BwdTensorIdx, FP8FwdTensorIdx

    from hymba_train.ops.swiglu_triton import swiglu_triton_fp8

    if not linear_fc2.fp8_initialized:  # it makes its quantizers when it is first called
        linear_fc2.init_fp8_metadata(num_gemms=1)
    result = linear_fc2.quantizers["scaling_fwd"][FP8FwdTensorIdx.GEMM1_INPUT]
    gradient = linear_fc1.quantizers["scaling_bwd"][FP8BwdTensorIdx.GRAD_OUTPUT1]
    return swiglu_triton_fp8(gate_up, result, gradient)
