"""The pages in docs/: complete, linked, and true to the code where that can be checked."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from hymba_train.cli import VERBS
from hymba_train.config import compose
from hymba_train.describe import model_tensors
from tests.recipes.rows import ROWS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def nav_files(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [file for item in (entry.values() if isinstance(entry, dict) else entry) for file in nav_files(item)]


def test_navigation_names_every_page_once():
    assert sorted(nav_files(SITE["nav"])) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            file = (page.parent / target).resolve()
            assert file.exists() and file.is_relative_to(DOCS), f"{target}: the site holds docs/ alone"


def test_the_list_of_keys_is_that_of_the_schema():
    sys.path.insert(0, str(DOCS))
    try:
        import make_keys
    finally:
        sys.path.remove(str(DOCS))
    assert (DOCS / "keys.md").read_text() == make_keys.page(), "run: python docs/make_keys.py"


def test_the_roadmap_is_that_of_the_recipes():
    sys.path.insert(0, str(DOCS))
    try:
        import make_roadmap
    finally:
        sys.path.remove(str(DOCS))
    assert (DOCS / "roadmap.md").read_text() == make_roadmap.page(), "run: python docs/make_roadmap.py"
    text = (DOCS / "roadmap.md").read_text()
    for size, rows in ROWS.items():
        assert all(f"| {row}_{size} |" in text for row in rows), size


def source_texts() -> str:
    """All text in the program that a user can come to see, literals joined as Python joins them."""
    parts = [(ROOT / "launch" / "job.sh").read_text()]
    for directory in ("hymba_train", "launch", "data_prep"):
        for file in (ROOT / directory).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts.append(node.value)
    return "\n".join(parts)


def test_every_message_that_is_explained_exists():
    said = source_texts()
    headings = re.findall(r"^### (.*)", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(messages) > 20
    assert [message for message in messages if message not in said] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_commands_in_the_pages_exist(page):
    code = "\n".join(re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip(), comments=True) if line.strip().startswith("hymba ") else []
        if words:
            assert words[1] in VERBS, line


def names_of(path: str) -> set[str]:
    """'NAME' and 'CLASS.MEMBER' of all that a file of the package defines."""
    found = set()
    for node in ast.parse((ROOT / "hymba_train" / path).read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
    return found


def test_names_in_the_diagrams_are_those_of_the_code():
    """In a node: <b>file</b>, the names in it; <i>parameters</i>."""
    step, layer = re.findall(
        r"^```mermaid\n(.*?)^```", (DOCS / "architecture.md").read_text(), re.MULTILINE | re.DOTALL
    )
    for diagram in (step, layer):
        nodes = re.findall(r"<b>(.+?)</b><br/>(.+?)(?:<br/>|\")", diagram)
        assert len(nodes) > 10 and len(nodes) == diagram.count("<b>")
        assert [(path, name) for path, names in nodes for name in names.split(", ") if name not in names_of(path)] == []
    model = compose(["model=hymba_tiny"]).model
    known = {part for tensor in model_tensors(model) for part in tensor.name.split(".")}
    named = [name for names in re.findall(r"<i>(.+?)</i>", layer) for name in names.split(", ")]
    assert len(named) > 10 and [name for name in named if name not in known] == []


def test_what_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    links = {target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target}
    assert len(links) > 10 and [target for target in links if not (ROOT / target).exists()] == []
    features = re.findall(r"^\| (.+) \| (.+) \|$", text.split("## Features")[1].split("## Where")[0], re.MULTILINE)
    assert len(features) > 30
    for feature, shown_by in features:
        tests = re.findall(r"`(tests/[^`:]+)(?:::(\w+))?`", shown_by)
        assert tests or "](" in shown_by or "python -m tests" in shown_by, f"nothing shows: {feature}"
        for path, name in tests:
            assert (ROOT / path).exists(), path
            assert f"def {name}(" in (ROOT / path).read_text() if name else True, name


def test_kubernetes_example_is_yaml():
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "kubernetes.md").read_text(), re.MULTILINE | re.DOTALL)
    worker = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    mounted = {mount["name"] for mount in worker["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["volumes"]}
