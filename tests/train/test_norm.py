"""The gradient norm does not depend on how the gradients are cut."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hymba_train.train.norm import install_norm


def test_norm_is_exact_and_the_same_for_any_cut(lone_runtime):
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    install_norm()
    grads = torch.randn(2**21, generator=torch.Generator().manual_seed(0)) * 1e-3
    true = float(grads.double().norm())
    for pieces in (1, 2, 16):
        norm = get_grad_norm_fp32(list(grads.chunk(pieces)), grad_stats_parallel_group=dist.group.WORLD)
        assert norm == pytest.approx(true, rel=1e-7)
