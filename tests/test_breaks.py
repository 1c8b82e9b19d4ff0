"""The deliberate breaks (tests/breaks.py makes them): their table, and what is said where one cannot be made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.breaks import CannotBreak, broken
from tests.breaks_list import BREAKS, Break

PAGE = Path(__file__).resolve().parents[1] / "docs" / "testing.md"


def test_the_table_has_every_break_and_the_test_that_noticed_it():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+\.py)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert [(name, path) for name, path, _ in rows] == [(change.name, change.path) for change in BREAKS]
    for change, (_, _, test) in zip(BREAKS, rows, strict=True):
        assert any(f"tests/{test}".startswith(wanted) for wanted in change.tests), test
    assert f"in {len(BREAKS)} places" in text


@pytest.mark.parametrize(
    ("text", "new", "says"),
    [
        ("x = 2\n", "x = 3", "has the text to be replaced 0 times"),
        ("x = 1\nx = 1\n", "x = 3", "has the text to be replaced 2 times"),
        ("x = 1\n", "x = ", "is no Python"),
    ],
)
def test_a_break_that_cannot_be_made_is_refused(text, new, says):
    with pytest.raises(CannotBreak, match=says):
        broken(text, Break("name", "file.py", "x = 1", new, ()))


def test_a_break_is_made():
    assert broken("x = 1\n", Break("name", "file.py", "x = 1", "x = 2", ())) == "x = 2\n"
