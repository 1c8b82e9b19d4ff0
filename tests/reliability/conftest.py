"""A finished run of tiny steps that tests copy and damage."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.children import child_environment
from tests.device import patience, training_variables
from tests.train.test_training import ROOT
from tests.train.tiny_run import write_data
from tests.warm import Warm, server


@pytest.fixture(scope="session")
def warm() -> Warm:
    """Starts trainings in a fraction of a second."""
    return server()


@pytest.fixture(scope="session")
def finished(warm, tmp_path_factory) -> Path:
    """Directory with data and one run of 10 steps, ``whole``, that has checkpoints of steps 5 and 10."""
    path = tmp_path_factory.mktemp("reliability")
    write_data(path)
    code, output = warm.train(path / "runs" / "whole", checkpoint__save_interval=5)
    assert code == 0, output
    return path


@pytest.fixture
def checkpoints(finished, tmp_path) -> Path:
    """A copy of its checkpoints, to damage."""
    shutil.copytree(finished / "runs" / "whole" / "checkpoints", tmp_path / "tiny" / "checkpoints")
    return tmp_path / "tiny" / "checkpoints"


def call(command: list[str], env: dict[str, str], timeout_seconds: float) -> tuple[int, str]:
    """(exit code, all output) of a command. Not through a pipe: helpers of a killed process would keep it open."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, timeout=patience(timeout_seconds), check=False
        )
        output.seek(0)
        return done.returncode, output.read()


def left_behind(word: str, seconds: float = 5.0) -> list[str]:
    """Command lines of processes that are still alive after ``seconds`` and have ``word`` there, or as RUN_OF."""
    deadline = time.monotonic() + patience(seconds)
    while True:
        alive = []
        for process in psutil.process_iter():
            try:
                command = " ".join(process.cmdline())
                run_of = process.environ().get("RUN_OF", "")
            except psutil.Error:
                continue
            if word in command or word in run_of:
                alive.append(f"{process.pid}: {command}")
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


def start_of_ranks(directory: Path, processes: int, runs: list[list[str]], restarts: int) -> tuple[list[str], dict]:
    """(command, environment) of tests.reliability.guarded_run under torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone",
        "--monitor-interval=0.1", f"--max-restarts={restarts}", "-m", "tests.reliability.guarded_run", str(directory),
        *" then ".join(" ".join(r) for r in runs).split(" "),
    ]  # fmt: skip
    environment = child_environment(
        **training_variables(), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", RUN_OF=str(directory)
    )
    return command, environment


def torchrun(directory: Path, runs: list[list[str]], restarts: int, timeout_seconds: float) -> tuple[int, str]:
    """(exit code, output) of runs on two ranks, one after the other; those that have finished are left out after a
    restart. Two more ``restarts`` are allowed: torchrun picks a free port which another program may take before the
    ranks do."""
    try:
        return call(*start_of_ranks(directory, 2, runs, restarts + 2), timeout_seconds)
    except subprocess.TimeoutExpired:  # of which the ranks know nothing
        for line in left_behind(str(directory), seconds=2):
            with contextlib.suppress(psutil.Error):
                psutil.Process(int(line.partition(":")[0])).kill()
        raise
