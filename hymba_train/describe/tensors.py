"""Every parameter of a model: those of its layers (a mixer's: :mod:`hymba_train.describe.mixers`) and of its ends."""

from __future__ import annotations

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.mixers import MIXERS
from hymba_train.describe.parameters import Slice, TensorDescription, norm_tensor
from hymba_train.describe.stack import LayerDescription, resolve_stack


def layer_tensors(model: ModelConfig, layer: LayerDescription) -> list[TensorDescription]:
    """Parameters of one layer, names below ``decoder.layers.{i}.`` (``model.layers.{i}.`` in Hugging Face)."""
    d = ModelDims.of(model)
    tensors = [norm_tensor("input_norm.weight", d.hidden_size, "input_layernorm.weight")]
    tensors += MIXERS[layer.mixer].tensors(model, layer)
    if layer.has_ffn:
        f = Slice("f", d.ffn_hidden_size)
        tensors += [
            norm_tensor("ffn_norm.weight", d.hidden_size, "pre_moe_layernorm.weight"),
            TensorDescription(
                "ffn.linear_fc1.weight", (2 * d.ffn_hidden_size, d.hidden_size),
                "moe.experts.0.{gate_proj,up_proj}.weight", 0,
                (Slice("gate", d.ffn_hidden_size), Slice("up", d.ffn_hidden_size)), True,
            ),
            TensorDescription(
                "ffn.linear_fc2.weight", (d.hidden_size, d.ffn_hidden_size), "moe.experts.0.down_proj.weight", 1,
                (f,), True,
            ),
        ]  # fmt: skip
    return tensors


def model_tensors(model: ModelConfig) -> list[TensorDescription]:
    """Every parameter of the model, full names, in forward order."""
    before, after = end_tensors(model)
    tensors = list(before)
    for layer in resolve_stack(model):
        for t in layer_tensors(model, layer):
            name, hf = f"decoder.layers.{layer.index}.{t.name}", f"model.layers.{layer.index}.{t.hf_name}"
            tensors.append(TensorDescription(name, t.shape, hf, t.axis, t.slices, t.weight_decay, t.float32))
    return [*tensors, *after]


def end_tensors(model: ModelConfig) -> tuple[list[TensorDescription], list[TensorDescription]]:
    """Parameters before the layers and after them, full names. A tied output layer has none of its own."""
    d = ModelDims.of(model)
    vocab = (Slice("vocab", d.vocab_size, block_multiple=model.make_vocab_size_divisible_by),)
    embedding = (d.vocab_size, d.hidden_size)
    before = [
        TensorDescription("embedding.word_embeddings.weight", embedding, "model.embed_tokens.weight", 0, vocab, True)
    ]
    if d.num_meta_tokens:
        shape = (d.num_meta_tokens, d.hidden_size)
        before.append(TensorDescription("embedding.meta_tokens", shape, "model.memory_tokens"))
    after = [TensorDescription("final_norm.weight", (d.hidden_size,), "model.final_layernorm.weight", float32=True)]
    if model.untie_embeddings_and_output_weights:
        after.append(TensorDescription("output_layer.weight", embedding, "lm_head.weight", 0, vocab, True))
    return before, after
