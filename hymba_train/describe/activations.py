"""Which tensors a rank keeps for its backward pass, by name, for the chosen backends. Plain Python, no torch.

:mod:`hymba_train.describe.saved` knows what each backend keeps; here they become the lists of a layer and of the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.attention_backends import ATTENTION, automatic_attention
from hymba_train.describe.dims import padded_vocab_size
from hymba_train.describe.saved import (
    FLOAT32,
    FP8,
    INT64,
    LOSSES,
    MOST_STATES,
    NORMS,
    SAVED_BY,
    SavedTensor,
    Setting,
    Sizes,
)
from hymba_train.describe.stack import LayerDescription, resolve_stack

_PARTS = {"attention": {name: backend.saved for name, backend in ATTENTION.items()}, **SAVED_BY}
OPS = (*_PARTS, *NORMS, "linear_cross_entropy")
BACKEND_KEYS = {
    "attention": "attention_backend", "selective_scan": "scan_backend", "ssd_scan": "ssd_backend",
    "causal_conv_rows": "conv_backend",
    "rotate_heads": "rope_backend", "group_rms_norm": "norm_backend", "normed_average": "norm_backend",
    "swiglu": "swiglu_backend", "rms_norm": "norm_backend", "add_rms_norm": "norm_backend",
    "linear_cross_entropy": "loss_backend",
}  # fmt: skip
"""Op -> key below ``precision.`` that chooses its backend."""
KNOWN_BACKENDS = {op: tuple((_PARTS | NORMS | {"linear_cross_entropy": LOSSES})[op]) for op in OPS}
PRODUCT_INPUTS = ("input_norm.out", "ffn_norm.out", "out_proj.in", "ffn.product")
"""Kept for nothing but the weight gradients of a layer's large products: under FP8 as the product read it."""
ON_GPU_ONLY = ("cuda", "triton", "mamba_ssm", *(name for name, backend in ATTENTION.items() if backend.on_gpu_only))


def backends_of(
    device: str, is_bf16: bool = True, deterministic: bool = False, num_states: int = MOST_STATES,
    asked: Mapping[str, str] | None = None, head_dim: int = 64,
) -> dict[str, str]:  # fmt: skip
    """Op -> backend on ``device`` (cpu | cuda), where every package is there: hymba_train.ops.registry in short.

    asked: op -> what the configuration says; what is not 'auto' there is taken. head_dim: of queries and keys.
    """
    auto = dict.fromkeys(OPS, "torch")
    if device != "cpu":
        auto = dict.fromkeys(OPS, "triton")
        auto["attention"] = automatic_attention(is_bf16, deterministic)
        auto["selective_scan"] = "cuda" if num_states <= MOST_STATES else "triton"
        auto["ssd_scan"] = "mamba_ssm" if is_bf16 and not deterministic else "torch"
        if head_dim & (head_dim - 1):
            auto["rotate_heads"] = "torch"
    return auto | {op: name for op, name in (asked or {}).items() if name != "auto"}


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
        return _PARTS[op][backends[op]](x)

    yield from NORMS["rms_norm"][backends["rms_norm"]](x, "input_norm")
    yield from x.mixer.saved(x, by)
    yield SavedTensor("out_proj.in", x.out_width, x.v)
    if x.description.has_ffn:
        yield from NORMS["add_rms_norm"][backends["add_rms_norm"]](x, "ffn_norm")
        yield from by("swiglu")
        yield SavedTensor("ffn.product", x.F, x.v)


def recomputed_saved_tensors(model: ModelConfig, layer: LayerDescription, setting: Setting) -> list[SavedTensor]:
    """What is left of a layer that is recomputed as a whole: its input; in a producer also K and V, because its
    consumers save them."""
    x = Sizes(model, layer, setting)
    saved = [SavedTensor("layer.in", x.D, x.v)]
    if layer.kv_role == "producer":
        groups = len(x.heads.kv_heads)
        saved.append(SavedTensor("attention.k_rotated", groups * x.dk, x.v))
        saved.append(SavedTensor("attention.v", groups * x.dv, x.v))
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
