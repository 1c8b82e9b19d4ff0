"""Tensors in Transformer Engine's FP8 that kernels of ours write. Its products take them as they are, as input and as
gradient, where they would else cast in a pass of its own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Quantizer(Protocol):
    """What is used of Transformer Engine's Float8Quantizer, one operand of one product under delayed scaling."""

    scale: Tensor  # float32, one value: what a value is multiplied by before it is cast
    amax: Tensor  # float32, one value: the largest magnitude since the scales moved last, before the scale
    dtype: Any  # Transformer Engine's name of a type


def dtype_of(quantizer: Quantizer) -> torch.dtype:
    """float8_e4m3fn or float8_e5m2."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[quantizer.dtype]


def tensor(data: Tensor, scale_inv: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    """``data`` in FP8, times scale_inv (float32 [1]), as a tensor that stands for one of ``dtype``.

    Without its transpose: a product that needs that (a weight's gradient on Hopper) makes it.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    return Float8Tensor(
        shape=data.shape, dtype=dtype, data=data.view(torch.uint8), fp8_scale_inv=scale_inv,
        fp8_dtype=quantizer.dtype, quantizer=quantizer, device=data.device,
    )  # fmt: skip
