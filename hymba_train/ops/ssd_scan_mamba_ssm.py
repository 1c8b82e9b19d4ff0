"""Scan of Mamba-2 by the Triton kernels of the package mamba_ssm, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_train.ops.segments import document_starts
from hymba_train.ops.ssd_scan import add_initial_state

CHUNK_TOKENS = 256
"""The authors' own choice."""


def ssd_scan_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`hymba_train.ops.ssd_scan.ssd_scan`; backend ``mamba_ssm``.

    The kernels keep documents apart but start each of them from zero; the initial state's part is added.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if not x.shape[1]:  # no meta tokens
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32)
        return x, state if initial_state is None else state + initial_state
    document = None if segment_ids is None else document_starts(segment_ids).int().cumsum(1, dtype=torch.int32) - 1
    y, state = mamba_chunk_scan_combined(
        x, dt, -torch.exp(A_log), B, C, CHUNK_TOKENS, D=D, dt_bias=dt_bias, seq_idx=document, dt_softplus=True,
        return_final_states=True,
    )  # fmt: skip
    state = state.float()
    if initial_state is None:
        return y, state
    return add_initial_state(y, state, x, dt, A_log, C, dt_bias, initial_state, segment_ids)
