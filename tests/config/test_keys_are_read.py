"""An option that nothing reads is a promise that nobody keeps."""

from __future__ import annotations

import ast
from pathlib import Path

from hymba_train.describe.backends import BACKEND_KEYS

ROOT = Path(__file__).parents[2]
SCHEMAS = ("hymba_train/config/schema.py", "launch/cluster.py")
NOT_A_CONFIG = {"self", "cls", "args"}


def keys() -> set[tuple[str, str]]:
    """(class, field) of every key in the schemas."""
    found = set()
    for schema in SCHEMAS:
        for item in ast.parse((ROOT / schema).read_text(encoding="utf-8")).body:
            if isinstance(item, ast.ClassDef):
                found |= {(item.name, line.target.id) for line in item.body if isinstance(line, ast.AnnAssign)}
    return found


def read_names() -> set[str]:
    """Attributes that are read of something which may be a configuration."""
    return {
        node.attr
        for room in ("hymba_train", "launch", "data_prep")
        for path in (ROOT / room).rglob("*.py")
        if ROOT / "hymba_train" / "hf" not in path.parents  # reads the published configuration
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        and not (isinstance(node.value, ast.Name) and node.value.id in NOT_A_CONFIG)
    }  # fmt: skip


def test_every_key_is_read():
    found = keys()
    assert {("OptimConfig", "adam_beta2"), ("ClusterConfig", "nodes")} <= found
    # data.blends becomes the blends of the phases when a configuration is composed (config/blends.py)
    composed_away = {("DataConfig", "blends")}
    names = read_names() | set(BACKEND_KEYS.values())  # read by hymba_train.describe.backends.asked_backends
    assert {key for key in found if key[1] not in names} == composed_away
