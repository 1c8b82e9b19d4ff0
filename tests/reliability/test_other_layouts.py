"""R9: a checkpoint that another layout loads and saves again holds the same parameters and moments, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.reliability.test_exact_resume import LAYOUT as DISTRIBUTED_OPTIMIZER
from tests.train.test_training import step_directory
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.reliability, pytest.mark.distributed]
STEP = 3
# 64 rows a rank, of which the third and fourth hold nothing but padding: 96 words.
FOUR = {"parallel__tensor": 4, "model__make_vocab_size_divisible_by": 64}
LAYOUTS = {
    "tp2": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pp2_vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "dp2": (2, DISTRIBUTED_OPTIMIZER),
    "single": (1, {}),
    "tp4_padding": (4, FOUR),
}
SAVE_WHAT_WAS_LOADED = """
from hymba_train.callbacks.checkpointing import Checkpointing
Checkpointing.on_train_start = lambda self, loop: None
"""


def tensors(path: Path) -> dict[str, torch.Tensor]:
    loaded = dist_checkpointing.load_plain_tensors(str(path))
    return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor) and not k.startswith("rng.")}


def go(warm, root: Path, name: str, layout: str, patch: str = "", **changes) -> dict[str, torch.Tensor]:
    ranks, settings = LAYOUTS[layout]
    warm.start(root / "runs" / name, ranks=ranks, patch=patch, run__train_steps=STEP, **{**settings, **changes})
    codes, output = warm.finish()
    assert codes == [0] * ranks, output
    return tensors(step_directory(root, name, STEP))


def hold_along(warm, root: Path, chain: list[str], **changes) -> None:
    first, *others = chain
    name = f"{first}_{len(chain)}"
    expected = go(warm, root, name, first, **changes)
    kinds = {k.split(".")[2] for k in expected if k.startswith("optimizer.")}
    assert {"exp_avg", "exp_avg_sq"} <= kinds
    for layout in others:
        load, name = str(step_directory(root, name, STEP)), f"{name}-{layout}"
        found = go(warm, root, name, layout, SAVE_WHAT_WAS_LOADED, checkpoint__load=load, **changes)
        # A float32 weight is its own master, of which only the distributed optimizer writes a copy.
        common = expected.keys() & found.keys()
        assert all("fp32_param" in k for k in expected.keys() ^ found.keys()), expected.keys() ^ found.keys()
        assert [k for k in common if not torch.equal(expected[k], found[k])] == [], name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("layouts")
    write_data(path)
    return path


def test_parameters_and_moments_survive_other_layouts(warm, root, lone_runtime):
    hold_along(warm, root, ["tp2", "pp2_vpp2", "dp2", "single"])


@pytest.mark.slow
def test_there_and_back_in_bf16(warm, root, lone_runtime):
    hold_along(warm, root, ["dp2", "tp2", "single", "pp2_vpp2", "dp2", "tp2"], precision__params="bf16")


@pytest.mark.slow
def test_a_rank_that_holds_nothing_but_padding(warm, root, lone_runtime):
    hold_along(warm, root, ["tp4_padding", "tp2", "tp4_padding", "single"])


@pytest.mark.parametrize("layout", ["single", pytest.param("dp2", marks=pytest.mark.slow)])
def test_float32_goes_on_from_the_masters_of_bf16(warm, root, lone_runtime, layout):
    bf16 = go(warm, root, f"bf16_{layout}", layout, precision__params="bf16")
    load = str(step_directory(root, f"bf16_{layout}", STEP))
    wide = go(warm, root, f"wide_{layout}", layout, SAVE_WHAT_WAS_LOADED, checkpoint__load=load)
    masters = {k.removeprefix("optimizer.state.fp32_param."): v for k, v in bf16.items() if ".fp32_param." in k}
    assert any(bf16[k].dtype == torch.bfloat16 and not torch.equal(bf16[k].float(), v) for k, v in masters.items())
    assert masters and [k for k, v in masters.items() if not torch.equal(wide[k], v)] == []


SMALL_BUCKETS = """
from hymba_train.train import main as training
wrap = training.wrap_model
training.wrap_model = lambda config, runtime, models: wrap(config, runtime, models, bucket_size=3000)
"""
MEGATRONS_OWN_PLACES = """
import contextlib
from hymba_train.checkpoint import optimizer_state
optimizer_state._places_without_padding = lambda buffers: contextlib.nullcontext()
"""


def wrong_masters(stored: dict[str, torch.Tensor]) -> list[str]:
    """float32 parameters are their own masters."""
    prefix = "optimizer.state.fp32_param."
    masters = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    assert len(masters) > 10
    return [k for k, master in masters.items() if not torch.equal(master, stored[k])]


def test_several_gradient_buckets(warm, root, lone_runtime):
    """Buckets are padded; the state of every parameter is its own all the same."""
    assert wrong_masters(go(warm, root, "buckets", "dp2", SMALL_BUCKETS)) == []
    without = go(warm, root, "buckets_control", "dp2", SMALL_BUCKETS + MEGATRONS_OWN_PLACES)
    assert len(wrong_masters(without)) > 10, "control: the test would see it"
