"""Word embeddings and meta tokens: the input of layer 0 as flat token rows (hymba-architecture 2.1)."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from hymba_train.model.config import HymbaConfig
from hymba_train.model.rows import TokenRows


class HymbaEmbedding(MegatronModule):
    """Word embeddings cut over the vocabulary, meta tokens [M, D] whole on every rank."""

    def __init__(self, config: HymbaConfig, padded_vocab_size: int, pg_collection) -> None:
        super().__init__(config)
        d = config.dims
        self.tp_group = pg_collection.tp
        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size, d.hidden_size, init_method=None, config=config, tp_group=pg_collection.tp
        )
        if d.num_meta_tokens:
            self.meta_tokens = nn.Parameter(torch.empty(d.num_meta_tokens, d.hidden_size, dtype=config.params_dtype))

    def forward(self, tokens: Tensor, rows: TokenRows) -> Tensor:
        """tokens int64 [B, S] -> [N, 1, D], split over axis 0 with sequence parallelism."""
        text = self.word_embeddings(tokens)
        meta = self.meta_tokens if self.config.dims.num_meta_tokens else text.new_zeros(0, text.shape[-1])
        hidden = rows.join(meta, text).unsqueeze(1)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden
