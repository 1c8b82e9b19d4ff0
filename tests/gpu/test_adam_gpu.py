"""The fused update on the GPU: equal to the plain loop's, divided and skipped by what the device says."""

from __future__ import annotations

import math

import pytest
import torch

from hymba_train.train.adam import GroupStepAdamW

pytestmark = pytest.mark.gpu
SHAPES = [(70, 33), (3,), (4, 2, 129), (100_003,)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make(device: str) -> tuple[GroupStepAdamW, list[torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g).to(device)) for shape in SHAPES]
    return GroupStepAdamW(params, **SETTINGS), params


def train(optimizer: GroupStepAdamW, params: list[torch.nn.Parameter], steps: range) -> None:
    device = params[0].device
    optimizer.divisor, optimizer.skip = torch.tensor(3.0, device=device), torch.tensor(0.0, device=device)
    for step in steps:
        g = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(device)
        optimizer.step()


def test_equals_the_plain_loop():
    (on_gpu, ours), (on_cpu, theirs) = make("cuda"), make("cpu")
    train(on_gpu, ours, range(20))
    train(on_cpu, theirs, range(20))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_leaves_no_trace():
    (plain, whole), (skipping, others) = make("cuda"), make("cuda")
    train(plain, whole, range(6))
    train(skipping, others, range(3))
    skipping.skip, skipping.divisor = torch.ones((), device="cuda"), torch.full((), math.nan, device="cuda")
    for p in others:
        p.grad = torch.full_like(p, math.nan)
    skipping.step()
    skipping.uncount()
    train(skipping, others, range(3, 6))
    assert skipping.param_groups[0]["step"] == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, others, strict=True))
