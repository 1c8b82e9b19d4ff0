"""Public functions and classes of the checked packages are annotated, and say what they do.

mypy asks for the annotations as well, but lets those of :mod:`hymba_train.ops` go, for autograd's and Triton's sake.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hymba_train.callbacks.base import Callback

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
OF_AUTOGRAD = ("forward", "backward")  # see torch.autograd.Function
HOOKS = tuple(vars(Callback))  # what they are for is said there
CLEAR_LINES = 3
"""A function of so few lines may go without: its name and its types say it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes, functions and methods by their names in the module; no kernels in Triton's language."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, Function)) and not node.name.startswith("_"):
            if "triton" in "".join(ast.unparse(d) for d in node.decorator_list):
                continue
            yield node.name, node
            for item in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(item, Function) and not item.name.startswith("_"):
                    yield f"{node.name}.{item.name}", item


def is_clear(node: ast.ClassDef | Function) -> bool:
    """A few lines, autograd's own, a callback's hook, or a group of the schema, of which every field is documented."""
    if isinstance(node, Function):
        return node.name in (*OF_AUTOGRAD, *HOOKS) or node.body[-1].end_lineno - node.body[0].lineno < CLEAR_LINES
    fields = [isinstance(item, ast.AnnAssign) for item in node.body]
    texts = [isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) for item in node.body]
    return any(fields) and all(text for field, text in zip(fields, [*texts[1:], False], strict=True) if field)


def is_annotated(function: Function) -> bool:
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return function.returns is not None and all(x.annotation or x.arg in ("self", "cls") for x in arguments)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_is_annotated_and_documented(package):
    problems, seen = [], 0
    for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for name, node in public(tree):
            seen += 1
            place = f"{path.relative_to(ROOT)}:{node.lineno} {name}"
            if isinstance(node, Function) and node.name not in OF_AUTOGRAD and not is_annotated(node):
                problems.append(f"{place}: not annotated")
            if not ast.get_docstring(node) and not is_clear(node):
                problems.append(f"{place}: no docstring")
    assert seen > 5
    assert not problems, "\n".join(problems)
