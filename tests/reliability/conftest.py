"""A finished run of tiny steps that tests copy and damage."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.reliability.warm import Warm
from tests.train.test_training import ROOT
from tests.train.tiny_run import write_data


@pytest.fixture(scope="session")
def warm():
    """Starts trainings in a fraction of a second."""
    server = Warm()
    yield server
    server.close()


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
            command, cwd=ROOT, env=env, stdout=output, stderr=output, timeout=timeout_seconds, check=False
        )
        output.seek(0)
        return done.returncode, output.read()
