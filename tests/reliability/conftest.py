"""A finished run of tiny steps that tests copy and damage."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.train.test_training import ROOT, run, start
from tests.train.tiny_run import write_data


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """Directory with data and one run of 10 steps, ``whole``, that has checkpoints of steps 5 and 10."""
    path = tmp_path_factory.mktemp("reliability")
    write_data(path)
    start(path, run("whole", "checkpoint.save_interval=5"))
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
            command, cwd=ROOT, env=env, stdout=output, stderr=output, timeout=timeout_seconds, check=False
        )
        output.seek(0)
        return done.returncode, output.read()


def left_behind(word: str, seconds: float = 5.0) -> list[str]:
    """Command lines of processes that are still alive after ``seconds`` and have ``word`` there, or as RUN_OF."""
    deadline = time.monotonic() + seconds
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
