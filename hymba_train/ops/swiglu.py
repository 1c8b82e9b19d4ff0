"""The gated FFN's product (hymba-architecture 2.10)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up of gate_up [..., 2F] = gate | up -> [..., F]. Backend ``torch``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
