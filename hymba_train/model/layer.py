"""One layer: norm, mixer, add; norm, FFN, add (hymba-architecture 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from hymba_train.describe import LayerDescription
from hymba_train.model.config import HymbaConfig
from hymba_train.model.ops import Ops
from hymba_train.model.rows import BatchContext
from hymba_train.parallel.cut import layer_cuts


@dataclass
class HymbaLayerSubmodules:
    """What a layer is built of (:mod:`hymba_train.model.layer_specs`)."""

    norm: ModuleSpec | type = None
    mixer: ModuleSpec | type = None
    ffn: ModuleSpec | type = None


class HymbaLayer(MegatronModule):
    """Built of ``submodules``. ``cuts``: name below the layer -> this rank's part, of every parameter."""

    def __init__(
        self, config: HymbaConfig, submodules: HymbaLayerSubmodules, layer: LayerDescription, ops: Ops, pg_collection
    ) -> None:
        super().__init__(config)
        self.layer = layer
        self.cuts = layer_cuts(config.model, layer, pg_collection.tp.size(), pg_collection.tp.rank())
        mixer_cuts = {n.removeprefix("mixer."): c for n, c in self.cuts.items() if n.startswith("mixer.")}

        def norm():
            return build_module(
                submodules.norm, config, config.hidden_size, eps=config.layernorm_epsilon, ops=ops,
                sequence_parallel=config.sequence_parallel,
            )  # fmt: skip

        self.input_norm = norm()
        self.mixer = build_module(
            submodules.mixer, config, layer=layer, cuts=mixer_cuts, ops=ops, pg_collection=pg_collection
        )
        if layer.has_ffn:
            self.ffn_norm = norm()
            self.ffn = build_module(submodules.ffn, config, swiglu_op=ops.swiglu, pg_collection=pg_collection)

    def forward(
        self, hidden: Tensor, batch: BatchContext, *kv: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """hidden [N(/TP), 1, D]; kv: its producer's K, V, in a consumer. -> (hidden, added; K, V if others consume it).

        ``added``, of hidden's shape, is still to be added to it, here and in the result: the next norm does it in
        passing.
        """
        hidden, normed = self.input_norm.of_sum(hidden, added)
        added, own_kv = self.mixer(normed, batch, kv or None)
        if self.layer.has_ffn:
            hidden, normed = self.ffn_norm.of_sum(hidden, added)
            added = self.ffn(normed)
        return (hidden, added, *own_kv) if self.layer.kv_role == "producer" else (hidden, added)
