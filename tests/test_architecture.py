"""The direction of imports: the contracts of pyproject.toml hold, and each of them can fail."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import child_environment

ROOT = Path(__file__).parents[1]
PACKAGES = ("hymba_train", "launch", "data_prep", "benchmarks", "tests")
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
HEAVY = ("torch", "megatron", "transformer_engine", "transformers", "numpy")

FORBIDDEN = [
    ("hymba_train/config/schema.py", "import hymba_train.plan", "Rooms import"),
    ("hymba_train/ops/rope.py", "from hymba_train import model", "Rooms import"),
    ("hymba_train/data/blend.py", "from hymba_train.train import step", "Rooms import"),
    ("hymba_train/hf/modeling_hymba.py", "from hymba_train import config", "Rooms import"),
    ("hymba_train/runs/chart.py", "def f():\n    from hymba_train.train import main", "The command alone"),
    ("hymba_train/train/loop.py", "from hymba_train.callbacks import jsonl", "Training knows callbacks"),
    ("hymba_train/plan/checkpoints.py", "def f():\n    import torch", "Configuration, descriptions and plan"),
    ("launch/cluster.py", "from hymba_train.ops import rope", "What runs on a login node"),
    ("hymba_train/ops/rope.py", "import megatron.core", "Kernels are free"),
    ("hymba_train/data/blend.py", "def f():\n    import megatron.core.datasets", "Megatron-Core is touched"),
    ("hymba_train/runs/chart.py", "import data_prep.merge", "The package imports neither"),
    ("hymba_train/evaluation/recall.py", "def f():\n    import tests.golden_data", "The package imports neither"),
]


def lint(directory: Path) -> tuple[int, str]:
    """(exit code, what it says) of import-linter on the packages in ``directory``."""
    done = subprocess.run(
        [sys.executable, "-c", LINT], capture_output=True, text=True, cwd=directory, timeout=120,
        env={**os.environ, "PYTHONPATH": str(directory), "COLUMNS": "200"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_contracts_hold():
    code, said = lint(ROOT)
    assert code == 0, said
    assert " 0 broken" in said


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        for path in (ROOT / name).rglob("*.py"):
            target = directory / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copyfile(ROOT / "pyproject.toml", directory / "pyproject.toml")
    return directory


@pytest.mark.parametrize(("path", "line", "contract"), FORBIDDEN)
def test_a_forbidden_import_breaks_its_contract(copied, path, line, contract):
    changed = copied / path
    before = changed.read_text(encoding="utf-8")
    changed.write_text(f"{before}\n\n{line}\n", encoding="utf-8")
    try:
        code, said = lint(copied)
    finally:
        changed.write_text(before, encoding="utf-8")
    broken = [name for name in said.splitlines() if " BROKEN" in name]
    assert code == 1 and any(name.startswith(contract) for name in broken), said


def test_every_room_is_in_the_contracts(copied):
    room = copied / "hymba_train" / "new_room"
    room.mkdir()
    try:
        (room / "__init__.py").write_text("")
        code, said = lint(copied)
    finally:
        shutil.rmtree(room)
    assert code != 0 and "new_room" in said, said


def test_plans_are_made_where_nothing_heavy_can_be_imported():
    """By what Python does, beside what import-linter reads: packages' __init__ and names made at run time, too."""
    code = f"""
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} must not be needed")

sys.meta_path.insert(0, Blocked())
for room in ("config", "describe", "plan", "outcome", "exit_codes"):
    module = importlib.import_module(f"hymba_train.{{room}}")
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"hymba_train.{{room}}."):
        importlib.import_module(info.name)
from hymba_train.cli import main
codes = [main(["plan", f"experiment={{name}}", "--skip-paths", "--json"]) for name in sys.argv[1:]]
assert codes == [0] * len(codes), codes
assert main(["plan", "--suggest", "gpus=8", f"experiment={{sys.argv[1]}}"]) == 0
"""
    experiments = sorted(path.stem for path in (ROOT / "recipes" / "experiment").glob("*.yaml"))
    assert "pretrain_1p5b" in experiments
    done = subprocess.run(
        [sys.executable, "-c", code, *experiments], capture_output=True, text=True, cwd=ROOT, timeout=240,
        env=child_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_exports_ship_files_that_stand_alone():
    """transformers loads them out of a directory, where only these packages are."""
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "mamba_ssm", "causal_conv1d"}
    files = {path.stem for path in (ROOT / "hymba_train" / "hf").glob("*.py")} - {"__init__"}
    assert files == {"configuration_hymba", "modeling_hymba"}
    for name in files:
        for node in ast.walk(ast.parse((ROOT / "hymba_train" / "hf" / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, ast.unparse(node)
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files, ast.unparse(node)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in allowed, ast.unparse(node)
