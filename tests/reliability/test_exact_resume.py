"""R1: kill -9 of any rank at any moment; torchrun starts all again; the run is the one that nobody killed."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.reliability.conftest import call
from tests.train.test_training import OVERLAP, ROOT, events, exact, run, step_directory
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.reliability, pytest.mark.distributed]
SAVES = ["checkpoint.save_interval=3", "checkpoint.keep_last=2", "checkpoint.async_save=true", *OVERLAP]
NUM_STEPS = 10


def fault(seed: int) -> list[str]:
    """Rank, step and moment of the kill. A step takes some 40 ms, so all of it is covered, saves included."""
    rng = random.Random(seed)
    values = (rng.randrange(2), rng.randrange(NUM_STEPS - 1), rng.uniform(0, 0.06))
    return [f"fault.{key}={value}" for key, value in zip(("rank", "step", "delay_seconds"), values, strict=True)]


def run_killed(directory: Path, seeds: range, timeout_seconds: int) -> str:
    """The unkilled run and one for each seed, in one torchrun: every kill costs one start of Python."""
    write_data(directory)
    runs = [run("unkilled", *SAVES), *(run(f"seed{seed}", *SAVES, *fault(seed)) for seed in seeds)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--monitor-interval=0.1",
        f"--max-restarts={len(seeds)}", "-m", "tests.reliability.faulty_run", str(directory),
        *" then ".join(" ".join(r) for r in runs).split(" "),
    ]  # fmt: skip
    # Without this the second round finds the addresses of the first round's groups in torchrun's store, and hangs.
    env = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    code, output = call(command, env, timeout_seconds)
    assert code == 0, output
    return output


def parameters(directory: Path, name: str) -> dict[str, torch.Tensor]:
    loaded = dist_checkpointing.load_plain_tensors(str(step_directory(directory, name, NUM_STEPS)))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def hold_to_unkilled(directory: Path, seeds: range) -> None:
    expected = exact(directory, "unkilled")
    assert sorted(events(directory, "unkilled")) == list(range(1, NUM_STEPS + 1))
    final = parameters(directory, "unkilled")
    assert any(key.startswith("optimizer.") for key in final)
    for seed in seeds:
        name = f"seed{seed}"
        assert (directory / f"{name}.killed").exists(), f"{name} was not killed"
        assert exact(directory, name) == expected, name
        killed = parameters(directory, name)
        assert killed.keys() == final.keys()
        assert [key for key in final if not torch.equal(final[key], killed[key])] == [], name
        assert not list((directory / "runs" / name / "checkpoints").glob("*.incomplete"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_kills(tmp_path, lone_runtime):
    run_killed(tmp_path, range(3), timeout_seconds=560)
    hold_to_unkilled(tmp_path, range(3))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(tmp_path, lone_runtime):
    run_killed(tmp_path, range(20), timeout_seconds=1700)
    hold_to_unkilled(tmp_path, range(20))
