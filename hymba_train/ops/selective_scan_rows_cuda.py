"""The scans of meta tokens and text through the CUDA kernels as one autograd function on flat rows.

The two halves of :class:`hymba_train.ops.selective_scan_cuda.CudaScan` for each part, without what autograd would do
around them: the output is not put together, gradients of the parts are written into one tensor, and the host goes
through one function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_train.ops import selective_scan_cuda as scan
from hymba_train.ops.gradient_slots import GradientSlot, new_slot, slot_of
from hymba_train.ops.nvrtc import Module


def can_scan_rows(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, *channel: Tensor) -> bool:
    """Whether no tensor has to be converted first."""
    kinds = {u.dtype, dt.dtype, z.dtype}, {B.dtype, C.dtype}
    return (
        all(len(k) == 1 and k <= {torch.bfloat16, torch.float32} for k in kinds)
        and all(x.dtype == torch.float32 and x.is_contiguous() for x in channel)
        and B.shape[1] <= scan.MAX_STATES
    )


def selective_scan_rows_cuda(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    num_meta: int, batch: int, seq: int, segment_ids: Tensor | None,
) -> Tensor:  # fmt: skip
    """:func:`hymba_train.ops.selective_scan_rows.selective_scan_rows`, of what :func:`can_scan_rows`."""
    ids = None if segment_ids is None else segment_ids.long()
    sizes, slots = (num_meta, batch, seq), tuple(slot_of(x) for x in (u, dt, z))
    return _ScanRows.apply(u, dt, z, B, C, A_log, D, dt_bias, ids, sizes, slots, torch.is_grad_enabled())


@dataclass
class _Part:
    """Stands in for the context of a CudaScan, of which this function calls forward and backward itself."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor | None, ...] = ()
    slots: tuple[GradientSlot | None, ...] = ()
    find_kernels: Callable[..., Module] | None = None

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


class _ScanRows(torch.autograd.Function):
    """u, dt, z [N, channels], B, C [N, states], A_log, D, bias -> y [N, channels]."""

    @staticmethod
    def forward(ctx, u, dt, z, B, C, A_log, D, bias, ids, sizes, slots, keep):
        num_meta, batch, seq = sizes
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        y[num_meta + batch * seq :].zero_()
        rows, meta_rows, text_rows = (u, dt, z, B, C), *_places(sizes)
        meta, text = _Part((keep,) * 12), _Part((keep,) * 12)
        forward: Callable[..., tuple[Tensor, Tensor]] = scan.CudaScan.forward
        _, state = forward(
            meta, *(x[meta_rows][None] for x in rows), A_log, D, bias, None, None,
            keep, (None,) * 3, y[meta_rows][None],
        )  # fmt: skip
        forward(
            text, *(x[text_rows].unflatten(0, (batch, seq)) for x in rows), A_log, D, bias, state[0], ids,
            keep, (None,) * 3, y[text_rows].unflatten(0, (batch, seq)),
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(*meta.saved_tensors, *text.saved_tensors)
            meta.saved_tensors = text.saved_tensors = ()
            ctx.parts, ctx.sizes, ctx.slots, ctx.shape, ctx.dtype = (meta, text), sizes, slots, u.shape, u.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (meta, text), (_, batch, seq) = ctx.parts, ctx.sizes
        half = len(ctx.saved_tensors) // 2
        meta.saved_tensors, text.saved_tensors = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        meta_rows, text_rows = _places(ctx.sizes)
        dy = dy.contiguous()
        slots = [slot or new_slot(ctx.shape, ctx.dtype, dy.device) for slot in ctx.slots]
        whole = [slot.take() for slot in slots]
        of_text, d_state = _backward(text, slots, text_rows, dy[text_rows].unflatten(0, (batch, seq)), None)
        assert d_state is not None
        of_meta, _ = _backward(meta, slots, meta_rows, dy[meta_rows][None], d_state[None])
        padding = slice(text_rows.stop, None)
        for place in whole:
            place[padding].zero_()
        dB, dC = (
            torch.cat((m[0], t.flatten(0, 1), t.new_zeros(ctx.shape[0] - text_rows.stop, t.shape[2])))
            for m, t in zip(of_meta[:2], of_text[:2], strict=True)
        )
        of_channels = torch._foreach_add(of_meta[2:], of_text[2:])
        # The node may live on through the next forward pass: nothing large with it.
        meta.saved_tensors = text.saved_tensors = meta.slots = text.slots = ()
        return *whole, dB, dC, *of_channels, None, None, None, None


def _places(sizes: tuple[int, int, int]) -> tuple[slice, slice]:
    """Rows of the meta tokens and of the text."""
    num_meta, batch, seq = sizes
    return slice(0, num_meta), slice(num_meta, num_meta + batch * seq)


def _backward(
    part: _Part, slots: list[GradientSlot], rows: slice, dy: Tensor, d_state: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """([dB, dC, dA_log, dD, dbias], d_initial) of one part; those of u, dt and z are put into its rows of ``slots``."""
    places = tuple(slot.part(0, rows.start, rows.stop) for slot in slots)
    part.slots = places
    gradients = scan.CudaScan.backward(part, dy, d_state)
    for slot, gradient in zip(places, gradients[:3], strict=True):
        slot.put(gradient)
    return list(gradients[3:8]), gradients[8]
