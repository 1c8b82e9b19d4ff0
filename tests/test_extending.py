"""docs/extending.md: what it names exists, and its counts are those of its own lists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`((?:hymba_train|recipes|tests|docs)/[\w./]+)`", TEXT)))
NAMES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))
KINDS = {"source": 0, "recipe": 1, "test": 2, "docs": 3}
MOST_SOURCE_FILES = 3


def sections() -> dict[str, str]:
    """Anchor -> text of every section."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)[1:]
    return {title.lower().replace(" ", "-"): text for title, text in zip(parts[::2], parts[1::2], strict=True)}


def counts() -> dict[str, list[int]]:
    """Anchor -> files of each kind, as the table at the top says."""
    rows = re.findall(r"^\| \[.+?\]\(#([\w-]+)\) \|(.+)\|$", TEXT, flags=re.MULTILINE)
    return {anchor: [int(cell) for cell in cells.split("|")[:4]] for anchor, cells in rows}


def defined(tree: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    """Names at the top of a module or class."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = node
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                found[target.id] = node
    return found


@pytest.mark.parametrize("path", PATHS)
def test_files_exist(path):
    place = ROOT / path
    assert place.parent.is_dir() if "NAME" in path else place.exists()


@pytest.mark.parametrize(("file", "name"), NAMES, ids=lambda part: part)
def test_names_are_defined_where_it_says(file, name):
    node: ast.stmt | ast.Module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        node = defined(node)[part]


def test_tests_that_must_be_run_have_their_names():
    said = {name for name in re.findall(r"`(test_\w+)`", TEXT)}
    known = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert said and not [name for name in said if f"def {name}(" not in known]


def test_the_table_counts_what_is_listed():
    assert set(counts()) == set(sections()) and len(counts()) == 7
    for anchor, text in sections().items():
        listed = [0, 0, 0, 0]
        for kind in re.findall(r"^\| (source|recipe|test|docs) \|", text, flags=re.MULTILINE):
            listed[KINDS[kind]] += 1
        assert listed == counts()[anchor], anchor
        assert listed[0] <= MOST_SOURCE_FILES, anchor
