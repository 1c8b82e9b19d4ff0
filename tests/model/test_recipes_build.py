"""Every recipe builds, on every rank of its layout, with exactly the parameters that its description says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from hymba_train.config import compose, recipes_directory
from hymba_train.describe import model_tensors
from tests.children import child_environment

ROOT = Path(__file__).resolve().parents[2]


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (Path(recipes_directory()) / group).glob("*.yaml"))


EXPERIMENTS = [f"experiment={name}" for name in options("experiment")]
MODELS = [f"model={name}" for name in options("model")]
LAYOUTS = [f"experiment=pretrain_1p5b,parallel={name}" for name in options("parallel")]
LAYOUTS += [f"experiment=demo,parallel={name}" for name in ("tp2", "pp2_vpp2")]


@pytest.fixture(scope="module")
def built():
    command = [sys.executable, "-m", "tests.model.build_on_meta", *EXPERIMENTS, *MODELS, *LAYOUTS]
    env = child_environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT", 1)[1])


@pytest.mark.parametrize("recipe", EXPERIMENTS + MODELS + LAYOUTS)
def test_builds_as_described(recipe, built):
    described = {t.name: math.prod(t.shape) for t in model_tensors(compose(recipe.split(",")).model)}
    assert built[recipe] == described


def test_the_1p5b_has_the_published_number_of_parameters(built):
    assert sum(built["model=hymba_1p5b"].values()) == 1_522_797_824
