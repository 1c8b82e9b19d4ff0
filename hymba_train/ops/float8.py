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


def of_input(linear: Any) -> Quantizer:
    """That of the input of one of Transformer Engine's linear layers."""
    from transformer_engine.pytorch.constants import FP8FwdTensorIdx

    if not linear.fp8_initialized:  # it makes its quantizers when it is first called
        linear.init_fp8_metadata(num_gemms=1)
    return linear.quantizers["scaling_fwd"][FP8FwdTensorIdx.GEMM1_INPUT]


def of_gradient(linear: Any) -> Quantizer:
    """That of its output's gradient, once it has been called."""
    from transformer_engine.pytorch.constants import FP8BwdTensorIdx

    return linear.quantizers["scaling_bwd"][FP8BwdTensorIdx.GRAD_OUTPUT1]


def dtype_of(quantizer: Quantizer) -> torch.dtype:
    """float8_e4m3fn or float8_e5m2."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[quantizer.dtype]


def memory(
    shape: tuple[int, ...], like: Tensor, quantizer: Quantizer | None
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(what a kernel writes its result into, its arguments SCALE, AMAX, SCALE_INV): as ``like``, or with a quantizer in
    FP8."""
    if quantizer is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device), (None, None, None)
    out = torch.empty(shape, dtype=torch.uint8, device=like.device).view(dtype_of(quantizer))
    return out, (quantizer.scale, quantizer.amax, torch.empty(1, dtype=torch.float32, device=like.device))


def tensor(data: Tensor, scale_inv: Tensor | None, quantizer: Quantizer | None, dtype: torch.dtype) -> Tensor:
    """``data`` in FP8, times scale_inv (float32 [1]), as a tensor that stands for one of ``dtype``; without a quantizer
    ``data`` itself.

    The transpose is not made: a product that needs that (a weight's gradient on Hopper) makes it.
    """
    if quantizer is None:
        return data
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    return Float8Tensor(
        shape=data.shape, dtype=dtype, data=data.view(torch.uint8), fp8_scale_inv=scale_inv,
        fp8_dtype=quantizer.dtype, quantizer=quantizer, device=data.device,
    )  # fmt: skip
