"""A wheel, installed without the checkout, has everything that the command needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hymba_train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Directory into which a freshly built wheel is installed."""
    built, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip"]
    source = tmp_path_factory.mktemp("source") / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, files)):  # a copy, so that nothing is left in the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source], check=True)
    (wheel,) = built.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    return target


def run(installed, tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    """``hymba`` from the wheel, away from the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    code = (
        "import sys, hymba_train, data_prep, launch; from hymba_train.cli import main;"
        f"assert all(m.__file__.startswith({str(installed)!r}) for m in (hymba_train, data_prep, launch));"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )


def test_wheel_finds_recipes_corpus_and_launchers(installed, tmp_path):
    done = run(installed, tmp_path, "data", "prepare-demo", "--output", "build/demo-data")
    assert done.returncode == 0, done.stderr
    done = run(installed, tmp_path, "plan", "experiment=demo")
    assert done.returncode == 0 and "hymba_tiny" in done.stdout, done.stderr
    slurm = ["launch", "slurm", "experiment=demo", "parallel=dp2", "cluster=local_test", "--nodes=1", "--dry-run"]
    done = run(installed, tmp_path, *slurm)
    assert done.stdout.startswith("#!/bin/bash") and "torch.distributed.run" in done.stdout, done.stderr
    assert not list(installed.glob("tests*"))


def test_one_version():
    assert re.search(r'^VERSION = "(.+?)"', (ROOT / "setup.py").read_text(), re.M)[1] == hymba_train.__version__
