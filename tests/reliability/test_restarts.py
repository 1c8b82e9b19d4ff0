"""Restarts that get nowhere end; what a killed rank has started ends with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hymba_train.outcome import read_outcome
from tests.children import child_environment
from tests.reliability.conftest import call, left_behind
from tests.reliability.test_numerics import PHASE, bad_run
from tests.train.test_training import run
from tests.train.tiny_run import write_data

pytestmark = pytest.mark.reliability


def guarded(directory: Path, *settings: str, restarts: int | None = None) -> tuple[int, str]:
    """A run of one rank, through torchrun if there may be ``restarts``."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = child_environment(
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", RUN_OF=str(directory)
    )
    env = {k: v for k, v in env.items() if k not in launcher}
    agent = ["torch.distributed.run", "--nproc-per-node=1", "--standalone", "--monitor-interval=0.1"]
    command = [sys.executable, "-m"]
    command += [] if restarts is None else [*agent, f"--max-restarts={restarts}", "-m"]
    command += ["tests.reliability.guarded_run", str(directory), *" ".join(settings).split(" ")]
    return call(command, env, timeout_seconds=280)


def starts_of(directory: Path, name: str) -> list[int]:
    lines = (directory / "runs" / name / "starts.jsonl").read_text().splitlines()
    return [record["from_step"] for record in map(json.loads, lines) if "from_step" in record]


def test_a_killed_rank_leaves_no_process_behind(tmp_path):
    """After a save, so that Megatron-Core's helper processes are there; and the monitor."""
    write_data(tmp_path)
    saves = ["checkpoint.save_interval=2", "checkpoint.async_save=true"]
    code, output = guarded(tmp_path, *run("killed", PHASE, *saves, 'fault.kind="exit"', "fault.step=7"))
    assert code == -9, output
    assert (tmp_path / "runs" / "killed" / "checkpoints" / "step_0000002").is_dir(), "no save was made: no helper"
    assert left_behind(str(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_restarts_without_progress_end_and_progress_does_not(tmp_path):
    write_data(tmp_path)
    settings = [PHASE, "checkpoint.save_interval=4", "guards.max_starts_without_progress=2", "logging.eval_interval=0"]
    fault = ['fault.kind="exit"', "fault.step=7"]
    code, output = guarded(tmp_path, *run("stuck", *settings, *fault), restarts=9)
    assert code == 1
    outcome = read_outcome(tmp_path / "runs" / "stuck")
    assert outcome.failed and outcome.step == 4 and "2 starts in a row from step 4" in outcome.reason
    assert starts_of(tmp_path, "stuck") == [0, 4, 4], "one start made progress, two did not, the rest did not train"
    assert "giving up: 2 starts in a row from step 4" in output


@pytest.mark.slow
def test_torchrun_does_not_try_again_what_a_guard_has_ended(tmp_path):
    write_data(tmp_path)
    settings = bad_run("stopped", "persistent", 'guards.on_persistent="stop"')
    code, _ = guarded(tmp_path, *settings, restarts=2)
    assert code == 1
    assert starts_of(tmp_path, "stopped") == [0], "the two restarts have read why"
    assert read_outcome(tmp_path / "runs" / "stopped").failed
