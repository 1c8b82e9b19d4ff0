"""The backends of every op, the key that chooses among them, and what 'auto' will choose. Plain Python, no torch.

hymba_train.ops.registry says the same of what is installed; tests/describe/test_saved_activations.py holds both
together.
"""

from __future__ import annotations

from hymba_train.config.schema import Config
from hymba_train.describe.attention_backends import ATTENTION, automatic_attention
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.saved import LOSSES, MOST_STATES, NORMS, SAVED_BY, Part

PARTS: dict[str, dict[str, Part]] = {"attention": {name: b.saved for name, b in ATTENTION.items()}, **SAVED_BY}
"""Op between two norms of the residual stream -> backend -> what it keeps for the backward pass."""
BACKEND_KEYS = {
    "attention": "attention_backend", "selective_scan": "scan_backend", "ssd_scan": "ssd_backend",
    "causal_conv_rows": "conv_backend",
    "rotate_heads": "rope_backend", "group_rms_norm": "norm_backend", "normed_average": "norm_backend",
    "swiglu": "swiglu_backend", "rms_norm": "norm_backend", "add_rms_norm": "norm_backend",
    "linear_cross_entropy": "loss_backend",
}  # fmt: skip
"""Op -> key below ``precision.`` that chooses its backend."""
KNOWN_BACKENDS = {op: tuple((PARTS | NORMS | {"linear_cross_entropy": LOSSES})[op]) for op in BACKEND_KEYS}
ON_GPU_ONLY = ("cuda", "triton", "mamba_ssm", *(name for name, backend in ATTENTION.items() if backend.on_gpu_only))


def asked_backends(config: Config) -> dict[str, str]:
    """Op -> backend that the configuration asks for, or 'auto'."""
    return {op: getattr(config.precision, key) for op, key in BACKEND_KEYS.items()}


def backends_of(config: Config, device: str) -> dict[str, str]:
    """Op -> backend on ``device`` (cpu | cuda), where every package is there."""
    auto = dict.fromkeys(BACKEND_KEYS, "torch")
    if device != "cpu":
        d, deterministic = ModelDims.of(config.model), config.run.deterministic
        is_bf16 = config.precision.params == "bf16"
        auto = dict.fromkeys(BACKEND_KEYS, "triton")
        auto["attention"] = automatic_attention(is_bf16, deterministic)
        auto["selective_scan"] = "cuda" if d.state_dim <= MOST_STATES else "triton"
        auto["ssd_scan"] = "mamba_ssm" if is_bf16 and not deterministic else "torch"
        if d.head_dim & (d.head_dim - 1):
            auto["rotate_heads"] = "torch"
    return auto | {op: name for op, name in asked_backends(config).items() if name != "auto"}
