"""Initial values: a function of seed and parameter name alone, hence equal under every parallel layout.

``init_method: mamba`` (default) departs from the released code where that hurts training from scratch:
dt bias such that softplus of it is log-uniform in 1e-3..1e-1 (Mamba, section 3.6), meta tokens at the scale of the
embedding, output projections scaled by 1/sqrt(2L) (GPT-2). ``published`` is what the released code does
(hymba-architecture 4.3).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from hymba_train.config.schema import ModelConfig
from hymba_train.describe import TensorDescription

DT_MIN, DT_MAX = 1e-3, 1e-1


def generator_for(seed: int, name: str) -> torch.Generator:
    """CPU generator of one parameter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def initial_value(model: ModelConfig, tensor: TensorDescription, seed: int) -> Tensor:
    """The whole parameter ``tensor`` (full name), float32, on the CPU."""
    g, shape = generator_for(seed, tensor.name), tensor.shape
    kind = tensor.name.split(".", 3)[-1] if tensor.name.startswith("decoder.layers.") else tensor.name
    mamba = model.init_method == "mamba"

    def normal(std: float) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=g)

    def uniform(bound: float) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=g)

    if kind.endswith("norm.weight") or kind == "mixer.D":
        return torch.ones(shape)
    if kind == "mixer.A_log" and len(shape) == 1:  # Mamba-2: uniform in 1..16, as its authors draw it
        return torch.empty(shape).uniform_(1, 16, generator=g).log()
    if kind == "mixer.A_log":
        return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().expand(shape).clone()
    if kind == "mixer.dt_bias":
        return _inverse_softplus_log_uniform(shape, g) if mamba else torch.zeros(shape)
    if kind.endswith("conv.bias"):
        return torch.zeros(shape)
    if kind.endswith("conv.weight") and mamba:
        return uniform(1 / math.sqrt(shape[1]))
    if kind == "mixer.dt_proj.weight" and mamba:
        return uniform(shape[1] ** -0.5)
    if kind == "embedding.meta_tokens":
        return normal(model.init_method_std if mamba else 1.0)
    if kind in ("mixer.out_proj.weight", "ffn.linear_fc2.weight") and mamba:
        return normal(model.init_method_std / math.sqrt(2 * model.num_layers))
    return normal(model.init_method_std)


def _inverse_softplus_log_uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    dt = torch.empty(shape).uniform_(low, high, generator=g).exp()
    return dt + torch.log(-torch.expm1(-dt))
