"""What decays, what is float32, what is clipped: the groups that Megatron-Core's optimizer really gets."""

from __future__ import annotations

import math

import pytest
import torch

from hymba_train.describe import model_tensors
from hymba_train.model import build_model_chunks
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.schedules import set_hyperparameters
from hymba_train.train.step import Stepper
from tests.train.tiny_run import tiny_config


def build(tmp_path, runtime, **changes):
    config = tiny_config(tmp_path, **changes)
    (model,) = build_model_chunks(config, runtime, [range(config.model.num_layers)])
    chunks = wrap_model(config, runtime, [model])
    return config, model, build_optimizer(config, runtime, chunks)


def test_no_decay_set_is_that_of_the_descriptions(tmp_path, lone_runtime):
    config, model, optimizer = build(tmp_path, lone_runtime)
    names = {id(param): description.name for _, param, description, _ in model.described_parameters()}
    grouped = {names[id(p)]: g["wd_mult"] for g in optimizer.param_groups for p in g["params"]}
    assert grouped == {t.name: float(t.weight_decay) for t in model_tensors(config.model)}


def test_no_decay_set_by_hand(tmp_path, lone_runtime):
    """The rule itself, apart from the descriptions: matrices decay, but not convolutions, A_log and meta tokens."""
    _, model, optimizer = build(tmp_path, lone_runtime)
    names = {id(param): description.name for _, param, description, _ in model.described_parameters()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = names[id(param)]
            free = param.dim() == 1 or any(part in name for part in ("conv.", "A_log", "meta_tokens"))
            assert group["wd_mult"] == (0.0 if free else 1.0), name


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_groups_hold_one_type_each(tmp_path, lone_runtime, distributed):
    changes = {"precision.params": "bf16", "parallel.distributed_optimizer": distributed}
    _, model, optimizer = build(tmp_path, lone_runtime, **changes)
    (inner,) = optimizer.chained_optimizers
    if distributed:
        bf16, float32 = inner.model_float16_groups, inner.model_fp32_groups
    else:
        bf16, float32 = inner.float16_groups, inner.fp32_from_fp32_groups
    assert all(bool(a) != bool(b) for a, b in zip(bf16, float32, strict=True))
    assert sum(len(g) for g in (*bf16, *float32)) == len(list(model.parameters()))
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.dtype is torch.float32 for p in masters)
    assert all(p.main_grad.dtype is torch.float32 for p in model.parameters())


def test_float32_parameters_stay_float32_in_a_bf16_model(tmp_path, lone_runtime):
    _, model, _ = build(tmp_path, lone_runtime, **{"precision.params": "bf16"})
    for name, param, description, _ in model.described_parameters():
        assert param.dtype is (torch.float32 if description.float32 else torch.bfloat16), name


@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_are_reduced_in_the_type_asked_for(tmp_path, lone_runtime, distributed):
    """In bf16 the sum over micro-batches is rounded after each: near, but not equal."""
    found = {}
    for in_fp32 in (True, False):
        changes = {"parallel.distributed_optimizer": distributed, "precision.grad_reduce_in_fp32": in_fp32}
        config = tiny_config(tmp_path, **{"precision.params": "bf16"}, **changes)
        (model,) = build_model_chunks(config, lone_runtime, [range(config.model.num_layers)])
        chunks = wrap_model(config, lone_runtime, [model])
        optimizer = build_optimizer(config, lone_runtime, chunks)
        for _, param, description, _ in model.described_parameters():
            is_wide = in_fp32 or description.float32
            assert param.main_grad.dtype is (torch.float32 if is_wide else torch.bfloat16), description.name
        tokens = torch.randint(0, config.model.vocab_size, (3, 1, 17), generator=torch.Generator().manual_seed(5))
        batches = [{"tokens": t[:, :-1], "labels": t[:, 1:]} for t in tokens]
        set_hyperparameters(optimizer.param_groups, 1e-3, 0.1)
        before = [p.detach().clone() for p in model.parameters()]
        result = Stepper(lone_runtime, chunks, optimizer).train(batches)
        assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        found[in_fp32] = result.loss, result.grad_norm
    assert found[False][0] == found[True][0]
    norm, exact = found[False][1], found[True][1]
    assert norm == pytest.approx(exact, rel=1e-2) and norm != exact


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_and_its_absence(tmp_path, lone_runtime, clip):
    """Without clipping the norm is measured all the same."""
    _, model, optimizer = build(tmp_path, lone_runtime, **{"optim.clip_grad": clip})
    for param in model.parameters():
        param.main_grad.fill_(0.1)
    total = math.sqrt(sum(p.numel() for p in model.parameters()) * 0.01)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    _, norm, _ = optimizer.step()
    assert norm == pytest.approx(total, rel=1e-5)
    after = math.sqrt(sum(float(p.main_grad.square().sum()) for p in model.parameters()))
    assert after == pytest.approx(clip or total, rel=1e-4)
