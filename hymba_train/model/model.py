"""The language model of one pipeline chunk."""

from __future__ import annotations

import copy
import inspect

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.enums import ModelType
from torch import Tensor

from hymba_train.describe import TensorDescription, model_tensors
from hymba_train.describe.dims import padded_vocab_size
from hymba_train.model.config import HymbaConfig
from hymba_train.model.embedding import HymbaEmbedding
from hymba_train.model.norm import RMSNorm
from hymba_train.model.ops import Ops
from hymba_train.model.output import OutputLayer
from hymba_train.model.rows import BatchContext, TokenRows, num_token_rows
from hymba_train.model.stack import HymbaStack, message_width
from hymba_train.parallel.cut import LocalTensor, local_tensor, sharded

TIED = "embedding.word_embeddings.weight"
# Megatron-Core 0.16 takes the group from its global state.
_CROSS_ENTROPY_TAKES_GROUP = "tp_group" in inspect.signature(vocab_parallel_cross_entropy).parameters


class HymbaModel(LanguageModule):
    """Embedding (first chunk), layers, final norm and output layer (last chunk).

    ``layer_range``: global numbers of this chunk's layers; ``chunk_starts``: first layers of all chunks of the model.
    ``rotary_base`` is the current phase's; the trainer sets it.
    """

    def __init__(
        self, config: HymbaConfig, spec: ModuleSpec, ops: Ops, layer_range: range, chunk_starts: list[int],
        pg_collection, *, rotary_base: float, recompute: bool = False, vp_stage: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage, self.rotary_base, self.ops = vp_stage, rotary_base, ops
        self.pre_process = layer_range.start == 0
        self.post_process = layer_range.stop == config.num_layers
        model = config.model
        self.share_embeddings_and_output_weights = not model.untie_embeddings_and_output_weights
        vocab = padded_vocab_size(model, self.tp_group.size())
        if self.pre_process:
            self.embedding = HymbaEmbedding(config, vocab, pg_collection)
        self.decoder = HymbaStack(config, spec, layer_range, ops, pg_collection, recompute)
        if self.post_process:
            self.final_norm = RMSNorm(
                config, config.hidden_size, config.layernorm_epsilon, ops, sequence_parallel=config.sequence_parallel
            )
            self.output_layer = OutputLayer(
                config.hidden_size, vocab, config=config, init_method=None, bias=False, gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.tp_group,
            )  # fmt: skip
            self.vocab_part = local_tensor(model_tensors(model)[0], self.tp_group.size(), self.tp_group.rank())["vocab"]
        self.input_tensor: Tensor | None = None
        self.message_width = message_width(config, chunk_starts, self.tp_group.size(), self.tp_group.rank())
        self._mark_parameters()

    def pipeline_config(self) -> HymbaConfig:
        """The configuration to hand to Megatron-Core's wrappers and schedules: a message is as wide as it says.

        Settings of the schedule (finalize_model_grads_func, no_sync_func, ...) belong there.
        """
        config = copy.copy(self.config)
        config.hidden_size = self.message_width
        return config

    def num_token_rows(self, batch: int, seq: int) -> int:
        """Rows of a micro-batch, for the schedule's seq_length (its micro_batch_size is 1)."""
        multiple = self.tp_group.size() if self.config.sequence_parallel else 1
        return num_token_rows(self.config.dims.num_meta_tokens, batch, seq, multiple)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by the schedules with the message of the chunk before."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, positions: Tensor | None = None,
        segment_ids: Tensor | None = None, document_ends: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One micro-batch through this chunk.

        Args:
            tokens: int64 [B, S]; needed by every chunk for its shape.
            labels: int64 [B, S], shifted already; -100 is not predicted.
            positions: int64 [B, S], position within the document; None: one document a row.
            segment_ids: int64 [B, S], document number in the row; None: one document a row.
            document_ends: int32, :func:`hymba_train.ops.segments.document_ends` of segment_ids; optional.

        Returns:
            Last chunk: loss per token [B, S] float32, zero where the label is -100; without labels, logits
            [B, S, V] over the true vocabulary (gathered over tensor-parallel ranks). Other chunks: message
            [N(/TP), 1, message_width].
        """
        b, s = tokens.shape
        dims = self.config.dims
        rows = TokenRows(dims.num_meta_tokens, b, s, self.num_token_rows(b, s))
        batch = BatchContext.of(
            rows, positions, segment_ids, document_ends, dims.head_dim, self.rotary_base, dims.conv_width - 1,
            tokens.device,
        )  # fmt: skip
        if self.pre_process:
            hidden, shared = self.embedding(tokens, rows), {}
        else:
            hidden, shared = self.decoder.unpack(self.input_tensor)
        hidden, added, shared = self.decoder(hidden, batch, shared)
        if not self.post_process:
            return self.decoder.pack(hidden if added is None else hidden + added, shared, self.message_width)
        _, normed = self.final_norm.of_sum(hidden, added)
        if labels is not None and self.tp_group.size() == 1:
            return self._losses_without_logits(normed, labels, rows)
        logits = self._logits(normed, rows)
        return self._gather_vocabulary(logits) if labels is None else self._token_losses(logits, labels)

    def _logits(self, normed: Tensor, rows: TokenRows) -> Tensor:
        """[N(/TP), 1, D] -> this rank's vocabulary columns [B, S, V'/TP]; those that pad the vocabulary are -inf."""
        logits, _ = self.output_layer(normed, weight=self._tied_weight())
        logits = rows.text(logits.flatten(1))
        true = self.vocab_part.count
        if true == logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= true
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min)

    def _losses_without_logits(self, normed: Tensor, labels: Tensor, rows: TokenRows) -> Tensor:
        """Loss per token [B, S] from [N, 1, D], where one rank holds the whole vocabulary."""
        text = rows.text(normed.flatten(1)).flatten(0, 1)
        vocab = self.config.dims.vocab_size
        losses = self.output_layer(
            text, weight=self._tied_weight(),
            loss=lambda hidden, weight: self.ops.linear_cross_entropy(hidden, weight, labels.flatten(), vocab),
        )  # fmt: skip
        return losses.view(labels.shape)

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        predicted = labels != -100
        group = {"tp_group": self.tp_group} if _CROSS_ENTROPY_TAKES_GROUP else {}
        losses = vocab_parallel_cross_entropy(logits.float(), labels.masked_fill(~predicted, 0), **group)
        return losses * predicted

    def _gather_vocabulary(self, logits: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        gathered = gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return gathered[..., : self.config.dims.vocab_size]

    # -- parameters as described ------------------------------------------------------------------------------------

    def described_parameters(self) -> list[tuple[str, torch.nn.Parameter, TensorDescription, LocalTensor]]:
        """(our name, parameter, description with full name, this rank's part) of every parameter of this chunk."""
        by_name = {t.name: t for t in model_tensors(self.config.model)}
        size, rank = self.tp_group.size(), self.tp_group.rank()
        found = []
        for name, param in self.named_parameters():
            # The SSM branch is a module of its own below the mixer, but its parameters are the mixer's by name.
            name = name.replace(".mixer.ssm.", ".mixer.")
            if name == "output_layer.weight" and self.share_embeddings_and_output_weights:
                name = TIED
            if name.startswith("decoder.layers."):
                _, _, position, below = name.split(".", 3)  # modules count from the chunk's first layer, names globally
                layer = self.decoder.layers[int(position)]
                cut = layer.cuts[below]
                name = f"decoder.layers.{layer.layer.index}.{cut.description.name}"
            else:
                cut = local_tensor(by_name[name], size, rank)
            found.append((name, param, by_name[name], cut))
        return found

    def _mark_parameters(self) -> None:
        """Attributes that Megatron-Core's optimizer, gradient norm and tied embeddings read."""
        for _, param, description, cut in self.described_parameters():
            is_cut = bool(cut.slices) and not cut.replicated
            param.tensor_model_parallel = is_cut
            param.partition_dim = description.axis if is_cut else -1
            param.partition_stride = 1
            param.apply_weight_decay = description.weight_decay
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        if self.share_embeddings_and_output_weights and (self.pre_process or self.post_process):
            weight = self.shared_embedding_or_output_weight()
            if self.config.pipeline_model_parallel_size == 1:
                weight.zero_out_wgrad = True
            else:
                weight.shared_embedding = True
                weight.shared = not self.pre_process  # counted once in the gradient norm

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's distributed format with true shapes and our names: any layout loads any other."""
        data_rank = self.pg_collection.dp_cp.rank()
        entries = {}
        for (name, param, _, cut), (module_name, _) in zip(
            self.described_parameters(), self.named_parameters(), strict=True
        ):
            copy_of_first_stage = name == TIED and not self.pre_process
            tensor_rank = self.tp_group.rank() if cut.replicated else 0
            replica = (int(copy_of_first_stage), tensor_rank, data_rank)
            entries[f"{prefix}{module_name}"] = sharded(cut, f"{prefix}{name}", param, replica)
        return entries
