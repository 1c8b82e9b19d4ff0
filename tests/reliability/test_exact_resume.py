"""R1: kill -9 of any rank at any moment, and a new start; the run is the one that nobody killed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from hymba_train.checkpoint.index import read_index
from tests.children import child_environment
from tests.device import training_variables
from tests.reliability.conftest import call
from tests.train.test_training import OVERLAP, events, exact, run, step_directory
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.reliability, pytest.mark.distributed]
NUM_STEPS = 10
SAVES = {"checkpoint__save_interval": 3, "checkpoint__keep_last": 2, "checkpoint__async_save": True}
LAYOUT = {f"parallel__{k}": True for k in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")}


def fault(seed: int) -> tuple[int, int, float]:
    """Rank, step and moment of the kill. A step takes some 40 ms, so all of it is covered, saves included."""
    rng = random.Random(seed)
    return rng.randrange(2), rng.randrange(NUM_STEPS - 1), rng.uniform(0, 0.06)


def parameters(directory: Path, name: str) -> dict[str, torch.Tensor]:
    loaded = dist_checkpointing.load_plain_tensors(str(step_directory(directory, name, NUM_STEPS)))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def hold_to_unkilled(directory: Path, names: list[str]) -> None:
    expected = exact(directory, "unkilled")
    assert sorted(events(directory, "unkilled")) == list(range(1, NUM_STEPS + 1))
    final = parameters(directory, "unkilled")
    assert any(key.startswith("optimizer.") for key in final)
    for name in names:
        assert exact(directory, name) == expected, name
        killed = parameters(directory, name)
        assert killed.keys() == final.keys()
        assert [key for key in final if not torch.equal(final[key], killed[key])] == [], name
        assert not list((directory / "runs" / name / "checkpoints").glob("*.incomplete"))


@pytest.fixture(scope="module")
def unkilled(warm, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    write_data(path)
    warm.start(path / "runs" / "unkilled", ranks=2, **SAVES, **LAYOUT)
    codes, output = warm.finish()
    assert codes == [0, 0], output
    return path


def kill_and_resume(warm, path: Path, seeds: range) -> None:
    for seed in seeds:
        rank, step, delay = fault(seed)
        marker = path / f"seed{seed}.killed"
        patch = f"from tests.reliability import faults; faults.kill_at_step({rank}, {step}, {delay}, {str(marker)!r})"
        warm.start(path / "runs" / f"seed{seed}", ranks=2, patch=patch, **SAVES, **LAYOUT)
        codes, output = warm.finish()
        assert codes[rank] == -9 and codes[1 - rank] != 0 and marker.exists(), output
        warm.start(path / "runs" / f"seed{seed}", ranks=2, **SAVES, **LAYOUT)
        codes, output = warm.finish()
        assert codes == [0, 0], output
    hold_to_unkilled(path, [f"seed{seed}" for seed in seeds])


def test_three_kills(warm, unkilled, lone_runtime):
    kill_and_resume(warm, unkilled, range(3))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(warm, unkilled, lone_runtime):
    kill_and_resume(warm, unkilled, range(100, 120))


def test_the_index_names_every_file(unkilled):
    """Both ranks have written: what the tests above compare is not one rank's work."""
    step = step_directory(unkilled, "unkilled", NUM_STEPS)
    files = {stored.relative_path for stored in read_index(step).storage_data.values()}
    assert files == {"__0_0.distcp", "__1_0.distcp"} == {p.name for p in step.glob("*.distcp")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_restarts_after_each_of_three_kills(tmp_path, lone_runtime):
    """The unkilled run and one for each seed, in one torchrun: every kill costs one start of Python."""
    write_data(tmp_path)
    saves = [f"{key.replace('__', '.')}={str(value).lower()}" for key, value in SAVES.items()]
    faults = {
        f"seed{s}": [f"fault.{k}={v}" for k, v in zip(("rank", "step", "delay_seconds"), fault(s), strict=True)]
        for s in range(3)
    }
    runs = [run("unkilled", *saves, *OVERLAP), *(run(n, *saves, *OVERLAP, *f) for n, f in faults.items())]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--monitor-interval=0.1",
        f"--max-restarts={len(faults)}", "-m", "tests.reliability.faulty_run", str(tmp_path),
        *" then ".join(" ".join(r) for r in runs).split(" "),
    ]  # fmt: skip
    # Without this the second round finds the addresses of the first round's groups in torchrun's store, and hangs.
    env = child_environment(**training_variables(), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    code, output = call(command, env, timeout_seconds=860)
    assert code == 0, output
    assert all((tmp_path / f"{name}.killed").exists() for name in faults)
    hold_to_unkilled(tmp_path, list(faults))
