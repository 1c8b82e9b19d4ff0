"""Which tensors a rank keeps for its backward pass, by name, for the chosen backends. Plain Python, no torch.

:mod:`hymba_train.describe.saved` knows what each backend keeps; here they become the lists of a layer and of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.backends import PARTS
from hymba_train.describe.dims import padded_vocab_size
from hymba_train.describe.saved import FLOAT32, FP8, INT64, LOSSES, NORMS, SavedTensor, Setting, Sizes
from hymba_train.describe.stack import LayerDescription, resolve_stack

PRODUCT_INPUTS = ("input_norm.out", "ffn_norm.out", "out_proj.in", "ffn.product")
"""Kept for nothing but the weight gradients of a layer's large products: under FP8 as the product read it."""


def layer_saved_tensors(model: ModelConfig, layer: LayerDescription, setting: Setting) -> list[SavedTensor]:
    """What one layer keeps for its backward pass, nothing recomputed, on the tensor-parallel rank that keeps most."""
    saved = {tensor.name: tensor for tensor in _of_layer(Sizes(model, layer, setting))}
    if setting.fp8:
        saved |= {name: replace(saved[name], num_bytes=FP8) for name in PRODUCT_INPUTS if name in saved}
    return [tensor for tensor in saved.values() if tensor.width]


def _of_layer(x: Sizes) -> Iterator[SavedTensor]:
    """With repetitions: a storage that several steps save has one name."""
    backends = x.setting.backends

    def by(op: str) -> Iterator[SavedTensor]:
        return PARTS[op][backends[op]](x)

    yield from NORMS["rms_norm"][backends["rms_norm"]](x, "input_norm")
    yield from x.mixer.saved(x, by)
    yield x.kept("out_proj.in", x.out_width)
    if x.description.has_ffn:
        yield from NORMS["add_rms_norm"][backends["add_rms_norm"]](x, "ffn_norm")
        yield from by("swiglu")
        yield x.kept("ffn.product", x.F)


def recomputed_saved_tensors(model: ModelConfig, layer: LayerDescription, setting: Setting) -> list[SavedTensor]:
    """What is left of a layer that is recomputed as a whole: its input; in a producer also K and V, because its
    consumers save them."""
    x = Sizes(model, layer, setting)
    saved = [x.kept("layer.in", x.D)]
    if layer.kv_role == "producer":
        groups = len(x.heads.kv_heads)
        saved.append(x.kept("attention.k_rotated", groups * x.dk))
        saved.append(x.kept("attention.v", groups * x.dv))
    return saved


def head_saved_tensors(model: ModelConfig, setting: Setting) -> list[SavedTensor]:
    """What final norm, output layer and cross entropy keep."""
    x = Sizes(model, resolve_stack(model)[0], setting)
    share = x.B * x.S / x.N  # of the rows: text
    if setting.tensor == 1:
        logits = LOSSES[setting.backends["linear_cross_entropy"]](model, setting)
    else:  # Megatron-Core's, in which the softmax replaces float32 logits
        logits = SavedTensor("logits", padded_vocab_size(model, setting.tensor) / setting.tensor, FLOAT32)
    norm = NORMS["rms_norm"][setting.backends["rms_norm"]](x, "final_norm")
    return [*norm, SavedTensor("logits", logits.width * share, logits.num_bytes), SavedTensor("labels", share, INT64)]


def logit_gradient_bytes(model: ModelConfig, setting: Setting) -> float:
    """Bytes per row of the logits' gradient in the activations' type, which stands beside them in the backward pass."""
    if setting.tensor == 1 and setting.backends["linear_cross_entropy"] == "triton":
        return 0.0  # in place
    logits = next(tensor for tensor in head_saved_tensors(model, setting) if tensor.name == "logits")
    return logits.width * setting.value_bytes
