"""GroupStepAdamW is PyTorch's AdamW with the step count in the group."""

from __future__ import annotations

import math

import pytest
import torch

from hymba_train.train.adam import GroupStepAdamW, install_adam

SHAPES = [(7, 5), (3,), (4, 2, 2)]


def parameters() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g) * 0.1
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def test_equals_pytorch_over_20_steps():
    ours, theirs = parameters(), parameters()
    train(GroupStepAdamW(groups(ours), **SETTINGS), ours, range(20))
    train(torch.optim.AdamW(groups(theirs), **SETTINGS), theirs, range(20))
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (a - start).abs().max() > 1e-2, "nothing was trained"


def test_state_dict_resumes_bit_for_bit():
    whole, halved = parameters(), parameters()
    train(GroupStepAdamW(groups(whole), **SETTINGS), whole, range(10))
    first = GroupStepAdamW(groups(halved), **SETTINGS)
    train(first, halved, range(5))
    second = GroupStepAdamW(groups(halved), **SETTINGS)
    second.load_state_dict(first.state_dict())
    train(second, halved, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole, halved, strict=True))


def test_a_group_without_gradients_counts_steps_too():
    params = parameters()
    optimizer = GroupStepAdamW([{"params": params}, {"params": [torch.nn.Parameter(torch.zeros(2))]}], **SETTINGS)
    train(optimizer, params, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]


def test_refuses_what_it_does_not_compute():
    with pytest.raises(ValueError, match="decoupled"):
        GroupStepAdamW(parameters(), adam_w_mode=False)
    with pytest.raises(ValueError, match="from the host"):
        GroupStepAdamW(parameters(), capturable=True)


def test_gradients_are_divided_by_what_the_device_says():
    ours, theirs = parameters(), parameters()
    optimizer = GroupStepAdamW(groups(ours), **SETTINGS)
    optimizer.divisor = torch.tensor(4.0)
    train(optimizer, ours, range(5))
    reference = GroupStepAdamW(groups(theirs), **SETTINGS)
    for step in range(5):
        g = torch.Generator().manual_seed(100 + step)
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=g) * 0.1 / 4.0
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_skipped_step_leaves_no_trace():
    """Weights, moments and counts: as if the step had not been; bad gradients do no harm."""
    whole, skipping = parameters(), parameters()
    reference, optimizer = GroupStepAdamW(groups(whole), **SETTINGS), GroupStepAdamW(groups(skipping), **SETTINGS)
    train(reference, whole, range(6))
    train(optimizer, skipping, range(3))
    optimizer.skip, optimizer.divisor = torch.tensor(1.0), torch.tensor(math.nan)
    for p in skipping:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    optimizer.uncount()
    optimizer.skip, optimizer.divisor = torch.tensor(0.0), torch.tensor(1.0)
    train(optimizer, skipping, range(3, 6))
    assert [group["step"] for group in optimizer.param_groups] == [6, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole, skipping, strict=True))


def test_install_replaces_whatever_megatron_core_found(lone_runtime):
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    install_adam()
    assert optimizer.Adam is distrib_optimizer.Adam is GroupStepAdamW
    assert not optimizer.USING_PYTORCH_OPTIMIZER and distrib_optimizer.HAVE_APEX_OR_TE
