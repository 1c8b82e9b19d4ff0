"""The mixer: one in_proj feeds an attention branch and an SSM branch side by side; their normed outputs are averaged.

::

    hidden --in_proj--> q, k, v, x, z
        attention(q, k, v)  --attention_norm--.
                                               (+) / 2 --out_proj-->
        ssm(x, z)           --ssm_norm--------'

With model.branch_fusion=concat the normed branches go into a wider out_proj side by side, and need not be equally wide.
A layer with one branch alone has no norms before out_proj. The module beside attention, or in its place, is the one
that :attr:`hymba_train.describe.mixers.Mixer.branch` names: built as ``branch(config, ops, tp_group)``, called as
``branch(hidden, batch, **parts)`` with the mixer's input [N(/TP), 1, D] and in_proj's slices by name [N, width], but
for attention's, it returns [N, 1, channels]. Its parameters are the mixer's by name.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, distributed, nn

from hymba_train.describe import LayerDescription
from hymba_train.describe.heads import heads_of_rank
from hymba_train.describe.mixers import MIXERS
from hymba_train.model.attention import AttentionBranch
from hymba_train.model.config import HymbaConfig
from hymba_train.model.ops import Ops, writes_fp8
from hymba_train.model.rows import BatchContext
from hymba_train.model.weights import Weights, rows_on_every_rank
from hymba_train.ops import float8
from hymba_train.ops.branch_norms import normed_concat
from hymba_train.ops.gradient_slots import split_columns
from hymba_train.parallel.cut import LocalTensor


@dataclass
class MixerSubmodules:
    """Linear layers of a mixer: local (CPU) or Transformer Engine."""

    in_proj: ModuleSpec | type = None
    out_proj: ModuleSpec | type = None


class LayerMixer(MegatronModule):
    """in_proj, branches, average, out_proj of one layer. ``cuts`` are its described parameters on this rank."""

    def __init__(
        self, config: HymbaConfig, submodules: MixerSubmodules, layer: LayerDescription, cuts: dict[str, LocalTensor],
        ops: Ops, pg_collection,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.layer, self.ops, self.tp_group = layer, ops, pg_collection.tp
        dims, tp, rank = config.dims, pg_collection.tp.size(), pg_collection.tp.rank()
        self.in_slices = cuts["in_proj.weight"].slices
        linear = dict(
            config=config, init_method=None, bias=False, skip_bias_add=False, is_expert=False, tp_group=self.tp_group
        )
        rows = sum(s.capacity for s in self.in_slices)
        self.in_proj = build_module(submodules.in_proj, dims.hidden_size, rows * tp, gather_output=False, **linear)
        if "kv_proj.weight" in cuts:
            kv = cuts["kv_proj.weight"]
            self.kv_proj = Weights(weight=torch.empty(kv.shape, dtype=config.params_dtype))
            self.kv_proj.weight.partial_gradient_across_tp = True
            self.kv_heads = heads_of_rank(dims, tp, rank).kv_heads
        if layer.has_attention:
            self.attention = AttentionBranch(dims, layer, ops, tp, rank)
        branch = MIXERS[layer.mixer].branch
        self.ssm = pkgutil.resolve_name(branch)(config, ops, self.tp_group) if branch else None
        if layer.has_attention and branch:
            for name in ("attention_norm", "ssm_norm"):
                shape = cuts[f"{name}.weight"].shape
                setattr(self, name, Weights(weight=torch.empty(shape, dtype=torch.float32)))
        width = cuts["out_proj.weight"].shape[1]
        self.out_proj = build_module(
            submodules.out_proj, width * tp, dims.hidden_size, input_is_parallel=True, **linear
        )
        in_fp8 = writes_fp8(config.fp8 and config.fp8_recipe, ops.normed_average.name)
        self.normed_average = partial(_normed_average_for, self.out_proj) if in_fp8 else ops.normed_average

    def forward(
        self, hidden: Tensor, batch: BatchContext, kv: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """hidden [N(/TP), 1, D] -> (same shape, K after RoPE and V of this layer, None in a consumer or SSM layer).

        ``kv`` is the producer's ([N, 1, G*dk], [N, 1, G*dv]); given in a consumer layer only.
        """
        projected, _ = self.in_proj(hidden)
        widths = [s.capacity for s in self.in_slices]
        columns = split_columns(projected.flatten(1), widths)  # [N, capacity] each
        parts = dict(zip((s.name for s in self.in_slices), columns, strict=True))
        own_kv, branches = None, []
        if self.layer.has_attention:
            q = parts.pop("q")
            if kv is None:
                k, v = (parts.pop("k"), parts.pop("v")) if "k" in parts else self._project_kv(hidden)
                kv = own_kv = (self.attention.rotate_keys(k, batch), v.unsqueeze(1))
            branches.append(self.attention(q, *kv, batch))
        if self.ssm is not None:
            branches.append(self.ssm(hidden, batch, **parts))
        fused = self._fuse(*branches) if len(branches) == 2 else branches[0]
        return self.out_proj(fused)[0], own_kv

    def _project_kv(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """K/V [N, ...] of the KV heads that this rank's queries need, from weights that every rank holds whole."""
        d, rows = self.config.dims, rows_on_every_rank(hidden, self.config, self.tp_group)
        k, v = self.kv_proj().weight.split([d.num_kv_heads * d.head_dim, d.num_kv_heads * d.value_head_dim])
        need = self.kv_heads
        return (
            nn.functional.linear(rows, k[need.start * d.head_dim : need.stop * d.head_dim]),
            nn.functional.linear(rows, v[need.start * d.value_head_dim : need.stop * d.value_head_dim]),
        )

    def _fuse(self, attention: Tensor, ssm: Tensor) -> Tensor:
        """(RMSNorm(attention) + RMSNorm(ssm)) / 2, or both side by side; norms over the branches' true widths
        (hymba-architecture 2.9)."""
        all_reduce = partial(distributed.all_reduce, group=self.tp_group) if self.tp_group.size() > 1 else None
        weights = self.attention_norm().weight, self.ssm_norm().weight
        eps, d = self.config.layernorm_epsilon, self.config.dims
        if self.config.model.branch_fusion == "concat":
            return normed_concat(attention, ssm, *weights, eps, (d.attention_size, d.inner_size), all_reduce)
        return self.normed_average(attention, ssm, *weights, eps, d.inner_size, all_reduce)


def _normed_average_for(out_proj, *args) -> Tensor:
    """In the FP8 that Transformer Engine's out_proj would cast it to, with delayed scaling."""
    from hymba_train.ops.normed_average_triton import normed_average_fp8

    return normed_average_fp8(*args, float8.of_input(out_proj))
