"""RNG states go into a checkpoint and come back."""

from __future__ import annotations

import torch

from hymba_train.checkpoint.tree import load_rng_tree, rng_tree
from hymba_train.train.main import seed_everything


def draws() -> list[float]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        forked = torch.rand(1).item()
    return [torch.rand(1).item(), forked]


def test_all_generators_continue_where_they_were(lone_runtime):
    seed_everything(3, deterministic=False)
    draws()
    taken = {name: tensor.data.clone() for name, tensor in rng_tree(0, 1).items()}
    expected = [draws(), draws()]
    assert expected[0] != expected[1]
    seed_everything(4, deterministic=False)
    load_rng_tree(taken)
    assert [draws(), draws()] == expected


def test_every_rank_has_a_row_of_its_own(lone_runtime):
    seed_everything(3, deterministic=False)
    for name, tensor in rng_tree(rank=2, world_size=4).items():
        assert tensor.key == f"rng.{name}"
        assert tensor.global_shape[0] == 4 and tensor.global_offset[0] == 2 and tensor.data.shape[0] == 1
