"""What the Triton backends of row-wise ops share: tensors as rows, block sizes, partial sums."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_train.errors import UserError

LEAST_ROWS = 16
"""Rows at least that a program of a backward kernel adds up into its line of a weight's gradient."""
VALUES_PER_THREAD = 32
"""Columns of a row that a thread holds, where a program holds a whole row."""


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] whose rows are contiguous and may lie any distance apart. Copies only if it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def block_of(width: int, op: str) -> int:
    """Columns of a program that holds a whole row of ``width`` columns in registers. UserError: too many."""
    if width > 16384:
        raise UserError(f"{op}: backend 'triton' holds a row in registers, at most 16384 columns, not {width}")
    return max(16, 1 << (width - 1).bit_length())


def warps_of(block: int, values_per_thread: int = VALUES_PER_THREAD) -> int:
    """Warps of a program with ``block`` columns."""
    return min(16, max(1, block // (32 * values_per_thread)))


def share_rows(num_rows: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(programs, rows of each) of a backward kernel, ``programs`` a multiprocessor where there are rows for all: they
    run at once and end together.

    Each adds its rows up into a line of partial sums, and the lines are added up afterwards. No atomics: the same bits
    every time.
    """
    each = max(LEAST_ROWS, -(-num_rows // (programs * multiprocessors(device))))
    return -(-num_rows // each), each


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere (Triton's interpreter) an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
