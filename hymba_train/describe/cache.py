"""What one sequence keeps while it is generated, counted in three ways. Plain Python, no torch.

================  =================================  ================================  ===============================
accounting        ours (what hymba_train.hf holds)   published (the released code)     paper (Tables 1 and 10)
================  =================================  ================================  ===============================
K/V of a local    W + 1 tokens and the meta tokens   W tokens and the meta tokens      W tokens
layer
K/V of a global   all tokens and the meta tokens     all tokens and the meta tokens    all tokens and the meta tokens
layer
layers that       as in model.kv_groups              as in model.kv_groups             half of the local layers, if
share K/V                                                                              any share
SSM state         float32                            16 bits                           16 bits
convolution       K - 1 inputs                       K inputs                          not counted
================  =================================  ================================  ===============================

Keys, values and inputs of the convolution are 16 bits wide. The paper's way was inferred from its figures: it gives all
of Table 10 to the printed digit at 8,000 tokens (hymba-architecture 5). Padding of buffers is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.mixers import MIXERS
from hymba_train.describe.stack import LayerDescription, resolve_stack

VALUE_BYTES = 2


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence under one accounting."""

    num_tokens: int  # text tokens, meta tokens not among them
    kv_bytes: int
    state_bytes: int  # SSM state, and inputs of the convolution where they are counted

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.state_bytes


@dataclass(frozen=True)
class Accounting:
    """How bytes are counted; see the head of this file."""

    own_token: bool  # a local layer holds its window and the token itself
    meta_in_local: bool
    half_of_local: bool  # layers that share K/V
    state_value_bytes: int
    conv_inputs: int | None  # of K taps: K plus this; None: none


ACCOUNTINGS = {
    "ours": Accounting(True, True, False, 4, -1),
    "published": Accounting(False, True, False, 2, 0),
    "paper": Accounting(False, False, True, 2, None),
}


def cache_bytes(model: ModelConfig, num_tokens: int, accounting: str = "ours") -> CacheBytes:
    """Cache of one sequence of ``num_tokens`` text tokens; ``accounting``: ours (true bytes) | published | paper.

    >>> from hymba_train.config import compose
    >>> model = compose(["model=hymba_1p5b"]).model
    >>> [round(cache_bytes(model, 8000, how).total_bytes / 1e6, 1) for how in ("paper", "published", "ours")]
    [78.6, 81.9, 85.0]
    """
    how, d, layers = ACCOUNTINGS[accounting], ModelDims.of(model), resolve_stack(model)
    token_bytes = d.num_kv_heads * (d.head_dim + d.value_head_dim) * VALUE_BYTES
    kv = 0.0
    for layer in layers:
        if not layer.has_attention:
            continue
        if layer.window is None:
            tokens = num_tokens + d.num_meta_tokens
        else:
            tokens = min(num_tokens, layer.window + how.own_token) + (d.num_meta_tokens if how.meta_in_local else 0)
        kv += tokens * token_bytes * _share(layer, bool(model.kv_groups), how)
    state = sum(_state_bytes(model, layer, how) for layer in layers)
    return CacheBytes(num_tokens, round(kv), state)


def _share(layer: LayerDescription, any_share: bool, how: Accounting) -> float:
    """Part of a layer's keys and values that is held for it."""
    if how.half_of_local:
        return 0.5 if any_share and layer.window is not None else 1.0
    return float(layer.kv_role != "consumer")


def _state_bytes(model: ModelConfig, layer: LayerDescription, how: Accounting) -> int:
    states, inputs = MIXERS[layer.mixer].cached_values(model)
    taps = 0 if how.conv_inputs is None else model.mamba_conv_width + how.conv_inputs
    return states * how.state_value_bytes + inputs * taps * VALUE_BYTES
