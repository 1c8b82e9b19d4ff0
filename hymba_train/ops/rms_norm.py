"""RMSNorm in T5's order (hymba-architecture 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., D] over its last axis and scale by weight [D]; result in x.dtype.

    The order matters in bf16: x goes to float32 (float64 stays), is normalised, is cast *back* to x.dtype, and only
    then multiplied by the weight, cast to x.dtype as well.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype)
