"""Each CPU override is there because something fails without it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.parallel import device
from tests.children import child_environment

ROOT = Path(__file__).resolve().parents[2]


def cpu_step(directory, *skip: str) -> subprocess.CompletedProcess:
    env = child_environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "tests.parallel.cpu_step", str(directory), *skip]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_train_save_and_resume_with_all_overrides(tmp_path):
    done = cpu_step(tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [o.name for o in device.CPU_OVERRIDES])
def test_fails_without(name, tmp_path):
    assert cpu_step(tmp_path, name).returncode != 0, f"override {name!r} is not needed: drop it"


def test_overrides_say_why():
    assert all(len(o.reason) > 20 for o in device.CPU_OVERRIDES)


def test_device_is_refused_by_name():
    with pytest.raises(UserError, match=r"run\.device='gpu': known are auto, cpu, cuda"):
        device.resolve_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_an_error_not_a_fall_back():
    with pytest.raises(UserError, match="sees no GPU"):
        device.resolve_device("cuda")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"run\.device=cuda, but torch sees no GPU"):
        device.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK=2, but this machine has 2 GPU\(s\)"):
        device.resolve_device("cuda")
    with pytest.raises(UserError, match="known are auto, cpu, cuda"):
        device.resolve_device("tpu")
