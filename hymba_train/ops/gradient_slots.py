"""Splitting a tensor so that its gradient is written once, in place, instead of being put together from parts.

Autograd's gradient of a slice is a zero tensor of the whole size with the slice filled in, and those of all slices are
added up. :func:`split_columns` and :func:`split_rows` allocate the whole gradient once, when the first part of it
comes, and reserve a :class:`GradientSlot` in it for every part. An op that knows slots (the Triton backends do) writes
its input's gradient right there; what comes from other ops is copied in.

    q, x, z = split_columns(projected, [1600, 3200, 3200])     # [N, 8000]
    meta, text = split_rows(x, [128, 8192])                    # slots inside x's slot
    y = rms_norm_triton(text[None], ...)                       # takes no slot: text[None] is another tensor

A slot belongs to the tensor that the split returned, not to views of it, and such a part must go to one op that uses
slots (to others as often as you like): two would overwrite each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Buffer:
    """The whole gradient [N, W], allocated when a part is first asked for."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    tensor: Tensor | None = field(default=None, repr=False)

    def get(self) -> Tensor:
        if self.tensor is None:
            self.tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.tensor


@dataclass(frozen=True)
class GradientSlot:
    """Rows and columns of a buffer that belong to one part."""

    buffer: _Buffer
    rows: tuple[int, int]
    columns: tuple[int, int]

    def take(self) -> Tensor:
        """Its memory [rows, columns]; the columns are contiguous, the rows as far apart as the buffer is wide."""
        return self.buffer.get()[slice(*self.rows), slice(*self.columns)]

    def part(self, dim: int, start: int, stop: int) -> GradientSlot:
        """The slot of rows (``dim`` 0) or columns (1) start..stop of this one, counted from its own first."""
        rows, columns = self.rows, self.columns
        if dim == 0:
            return GradientSlot(self.buffer, (rows[0] + start, rows[0] + stop), columns)
        return GradientSlot(self.buffer, rows, (columns[0] + start, columns[0] + stop))

    def put(self, gradient: Tensor | None) -> None:
        """Make sure that its memory holds ``gradient`` (None: zero), which may be there already."""
        place = self.take()
        if gradient is None:
            place.zero_()
        elif not _is_same_memory(gradient, place):
            place.copy_(gradient.reshape(place.shape))


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype:
        return False
    try:
        a = a.view(b.shape)
    except RuntimeError:  # not a view of that shape
        return False
    # The stride of an axis of one element means nothing, and torch does not keep it.
    return all(x == y for x, y, size in zip(a.stride(), b.stride(), b.shape, strict=True) if size > 1)


def slot_of(x: Tensor) -> GradientSlot | None:
    """The place reserved for x's gradient, if a split returned x."""
    return getattr(x, "_gradient_slot", None)


def new_slot(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> GradientSlot:
    """A slot that is the whole of a gradient [N, W]."""
    rows, columns = shape
    return GradientSlot(_Buffer((rows, columns), dtype, device), (0, rows), (0, columns))


def view_with_slot(part: Tensor, view: Tensor) -> Tensor:
    """``view``, a view of all of ``part`` with the same columns, with part's slot: it is used in part's place."""
    view._gradient_slot = slot_of(part)  # type: ignore[attr-defined]  # ours, on torch's class
    return view


def empty_gradient(slot: GradientSlot | None, rows: Tensor) -> Tensor:
    """Memory to write the gradient of ``rows`` [N, W] into: the slot, or new."""
    if slot is None:
        return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    place = slot.take()
    return place.view(rows.shape) if place.shape != rows.shape else place


def split_columns(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """x [N, W] -> views [N, w] of ``widths`` columns each, one after another; they add up to W."""
    return _split(x, widths, 1)


def split_rows(x: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """x [N, W] -> views [n, W] of ``counts`` rows each, one after another; they add up to N."""
    return _split(x, counts, 0)


def _split(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    if x.dim() != 2 or sum(sizes) != x.shape[dim]:
        raise ValueError(f"{list(sizes)} do not add up to axis {dim} of a matrix {list(x.shape)}")
    parent = slot_of(x)
    whole = parent or new_slot(x.shape, x.dtype, x.device)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    slots = [whole.part(dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]
    parts = _Split.apply(x, tuple(sizes), dim, whole, slots, parent is None)
    for part, slot in zip(parts, slots, strict=True):
        part._gradient_slot = slot
    return parts


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, dim, whole, slots, is_root):
        ctx.set_materialize_grads(False)
        ctx.whole, ctx.slots, ctx.is_root = whole, slots, is_root
        return x.split(sizes, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        for slot, gradient in zip(ctx.slots, gradients, strict=True):
            slot.put(gradient)
        whole = ctx.whole.take()
        if ctx.is_root:  # whoever asks again (retain_graph) gets new memory
            ctx.whole.buffer.tensor = None
        return whole, None, None, None, None, None
