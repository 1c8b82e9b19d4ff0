"""Layouts for a number of GPUs, sizes of cache and checkpoints, the picture of the stack."""

from __future__ import annotations

import json

import pytest

from hymba_train.cli import main
from hymba_train.config import compose
from hymba_train.describe import cache_bytes
from hymba_train.errors import UserError
from hymba_train.plan import make_plan
from hymba_train.plan.checkpoints import checkpoint_sizes
from hymba_train.plan.picture import draw_stack
from hymba_train.plan.suggest import MEMORY_IN_USE, suggest

BIG = ["experiment=pretrain_1p5b"]


def test_every_suggestion_is_possible_and_fits():
    config = compose(BIG)
    found = suggest(config, 64, 80.0)
    assert found == sorted(found, key=lambda s: s.relative_time) and len(found) >= 3
    for option in found:
        assert option.tensor * option.pipeline * option.data == 64
        assert option.memory_gib <= 80 * MEMORY_IN_USE and option.relative_time > 0.999
        plan = make_plan(compose([*BIG, *option.overrides.split()]), 64, check_paths=False)
        assert (plan.data_parallel, plan.config.parallel.recompute) == (option.data, option.recompute)
        assert tuple(phase.micro_batch_size for phase in plan.phases) == option.micro_batch_sizes
        assert max(stage.total_bytes for stage in plan.memory) / 2**30 == pytest.approx(option.memory_gib)


def test_plain_data_parallelism_wins_where_it_fits():
    best = suggest(compose(BIG), 64, 141.0)[0]
    assert (best.tensor, best.pipeline, best.data, best.recompute) == (1, 1, 64, "none")


def test_less_memory_means_smaller_micro_batches_or_recomputation():
    roomy, tight = (suggest(compose(BIG), 64, memory) for memory in (141.0, 40.0))
    assert tight[0].relative_time >= roomy[0].relative_time
    assert all(option.memory_gib <= 40 * MEMORY_IN_USE for option in tight)


def test_overrides_are_all_that_differs():
    """Starting from a layout unlike any suggestion: its own split, virtual stages and missing optimizer shards go."""
    base = [*BIG, "parallel=pp2_vpp2", "parallel.world_size=null", "parallel.pipeline_layout=[8,8,8,8]"]
    for option in suggest(compose(base), 16, 141.0):
        plan = make_plan(compose([*base, *option.overrides.split()]), 16, check_paths=False)
        assert max(stage.total_bytes for stage in plan.memory) / 2**30 == pytest.approx(option.memory_gib)
        assert plan.config.parallel.distributed_optimizer is (option.data > 1)


def test_nothing_fits():
    with pytest.raises(UserError, match=r"no layout of 1 GPUs fits into 90% of 4 GiB; the smallest needs \d"):
        suggest(compose(BIG), 1, 4.0)
    with pytest.raises(UserError, match="no layout of 7 GPUs is possible"):
        suggest(compose(BIG), 7)


def test_the_cache_of_the_1p5b():
    model = compose(BIG).model
    cache = cache_bytes(model, 8192)
    assert 60 < cache.total_bytes / 2**20 < 100  # the paper: 79 MB at 8k
    wide = cache_bytes(model, 16384)
    assert wide.state_bytes == cache.state_bytes and cache.kv_bytes < wide.kv_bytes < 2 * cache.kv_bytes


def test_the_cache_by_hand():
    config = compose(
        ["experiment=demo", "model.layer_pattern=[attention,ssm]", "model.kv_groups=[]", "model.num_layers=2"]
    )
    model = config.model
    model.global_layers, model.window_size = [0], 4
    cache = cache_bytes(model, 100)
    heads = model.num_query_groups * (1 + model.mamba_expand) * model.hidden_size // model.num_attention_heads
    assert cache.kv_bytes == (100 + model.num_meta_tokens) * heads * 2
    assert cache.state_bytes == model.mamba_expand * model.hidden_size * (model.mamba_state_dim * 4 + 3 * 2)


def test_checkpoints():
    config = compose(BIG)
    few, many = (checkpoint_sizes(config, 10**9, gpus) for gpus in (8, 512))
    assert few.num_bytes == 14 * 10**9 and few.save_seconds == pytest.approx(14)
    assert few.best_interval_seconds == pytest.approx(8 * many.best_interval_seconds)
    assert checkpoint_sizes(compose(["experiment=demo"]), 1000, 1).num_bytes == 12_000


def test_on_the_command_line(capsys, tmp_path):
    assert main(["plan", *BIG, "--skip-paths"]) == 0
    out = capsys.readouterr().out
    assert "inference: a sequence of 8,192 tokens keeps" in out and "checkpoints: 19.9 GiB each" in out
    assert main(["plan", *BIG, "--suggest", "gpus=16,memory=80"]) == 0
    assert "Layouts of 16 GPUs with 80 GiB" in capsys.readouterr().out
    assert main(["plan", *BIG, "--suggest", "gpus=16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["overrides"].startswith("parallel.")
    assert main(["plan", *BIG, "--suggest", "16"]) == 2
    assert "write gpus=64" in capsys.readouterr().err
    assert main(["plan", *BIG, "--skip-paths", "--png", str(tmp_path / "stack.png")]) == 0
    assert (tmp_path / "stack.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["plan", *BIG, "--skip-paths", "--json"]) == 0
    capsys.readouterr()


def test_a_picture_with_stages(tmp_path):
    plan = make_plan(compose([*BIG, "parallel=pp2_vpp2"]), check_paths=False)
    draw_stack(plan, tmp_path / "stack.png")
    with pytest.raises(UserError, match="cannot be written"):
        draw_stack(plan, tmp_path / "no" / "such" / "stack.png")
