"""The oldest Megatron-Core that the metadata allows: golden data in one process, parity in two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "0.16.1"  # setup.py's lower bound


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Environment in which megatron.core is the oldest one."""
    target = tmp_path_factory.mktemp("megatron")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    done = subprocess.run([*install, f"megatron-core=={OLDEST}"], capture_output=True, text=True, timeout=200)
    if done.returncode:
        pytest.skip(f"megatron-core {OLDEST} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return {
        **os.environ, "PYTHONPATH": f"{target}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def test_setup_allows_it():
    assert f"megatron-core>={OLDEST}," in (ROOT / "setup.py").read_text()


def test_golden_data_in_one_process(env):
    check = f"import megatron.core as m; assert m.__version__ == '{OLDEST}', m.__version__"
    subprocess.run([sys.executable, "-c", check], env=env, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/test_golden.py"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.distributed
def test_two_processes_equal_one(env, tmp_path):
    """Tensor and sequence parallel with uneven heads; distributed optimizer with overlap."""
    names = {1: ["single"], 2: ["tp2_sp", "dp2_distributed_optimizer_overlap"]}
    for processes, layouts in names.items():
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        arguments = ["-m", "tests.distributed.worker", "cpu", str(tmp_path), *[f"heads25/{x}" for x in layouts]]
        done = subprocess.run([*launch, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-4000:]
    single = torch.load(tmp_path / "heads25-single.pt", weights_only=True)
    for layout in names[2]:
        parallel = torch.load(tmp_path / f"heads25-{layout}.pt", weights_only=True)
        assert parallel["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert parallel["norms"] == pytest.approx(single["norms"], rel=1e-5)
        assert parallel["faults"] == []


@pytest.mark.slow
def test_checkpoints_save_and_load(env):
    """Whole runs: resumed bit for bit, in the background and not, bf16, both optimizers, damage."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/train/test_training.py"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
