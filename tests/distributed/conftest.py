"""Runs all layouts of one world size in one start of its ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.children import child_environment
from tests.distributed.cases import LAYOUTS, MODELS, control_of, fits
from tests.warm import server

ROOT = Path(__file__).resolve().parents[2]


def torchrun(
    nproc: int, module: str, *arguments: str, timeout_seconds: int = 900, on_gpus: bool = False
) -> subprocess.CompletedProcess:
    """``python -m module`` on ``nproc`` ranks of one thread each; fails the test with their output."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", "--standalone", "-m", module]
    env = child_environment(OMP_NUM_THREADS="1", **({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}))
    try:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(
            f"not done after {timeout_seconds} s\n{(late.stdout or b'').decode()}\n{(late.stderr or b'').decode()}"
        )
    assert done.returncode == 0, f"{' '.join(command[3:])} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def asked_for(items: list[pytest.Item]) -> set[str]:
    """MODEL/LAYOUT of all that the chosen tests compare."""
    names = set()
    for item in items:
        # Fixtures of this name are elsewhere too.
        if item.path.parent != Path(__file__).parent or "trained" not in getattr(item, "fixturenames", ()):
            continue
        if "pair" in item.callspec.params:
            model, layout = item.callspec.params["pair"]
            names |= {f"{model}/{layout.name}", f"{model}/{control_of(layout)}"}
        else:
            names.add(f"{item.callspec.params['model']}/single")
    return names


@pytest.fixture(scope="session")
def trained(tmp_path_factory, request):
    """(model, layout) -> what tests.distributed.worker wrote; each world size is launched when first asked for."""
    out = tmp_path_factory.mktemp("layouts")
    launched = set()
    asked = asked_for(request.session.items)

    def get(model: str, layout) -> dict:
        if layout.world_size not in launched:
            launched.add(layout.world_size)
            all_here = [
                f"{m}/{x.name}" for m in MODELS for x in LAYOUTS if x.world_size == layout.world_size and fits(m, x)
            ]
            wanted = [name for name in all_here if name in asked]
            server().run(layout.world_size, "tests.distributed.worker", "cpu", str(out), *wanted, timeout_seconds=900)
        return torch.load(out / f"{model}-{layout.name}.pt", weights_only=True)

    return get
