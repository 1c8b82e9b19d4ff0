"""Breaks the code on purpose, one place after another, and says which test notices.

``python -m tests.breaks`` copies the tree, replaces one piece of text in the copy and runs the tests that should fail
there, for every place of :data:`tests.breaks_list.BREAKS`; the test that fails must pass without the break. ``--only
TEXT ...`` takes those with such a name, ``--check`` only looks whether every text is still there. Prints a row of the
table in docs/testing.md for each; exits with 1 if a break was not noticed, or could not be made.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.breaks_list import BREAKS, Break

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "dist", "runs", "*.egg-info")
DEFAULT_TIER = "not slow and not slurm and not gpu and not multigpu"
MOST_SECONDS = 1800
_CAUGHT = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$", re.MULTILINE)


class CannotBreak(Exception):
    """The text to be replaced is not in the file exactly once, or what replaces it is no Python."""


def broken(text: str, change: Break) -> str:
    """``text`` of ``change.path`` with the break in it. Raises CannotBreak."""
    found = text.count(change.old)
    if found != 1:
        raise CannotBreak(f"{change.path} has the text to be replaced {found} times, not once:\n{change.old}")
    result = text.replace(change.old, change.new)
    try:
        compile(result, change.path, "exec")
    except SyntaxError as error:
        raise CannotBreak(f"{change.path}: what the break makes is no Python ({error})") from error
    return result


def check(changes: list[Break]) -> list[str]:
    """What is out of date: a line for each break that cannot be made, and for each test file that is not there."""
    problems = []
    for change in changes:
        try:
            broken((ROOT / change.path).read_text(encoding="utf-8"), change)
        except (OSError, CannotBreak) as error:
            problems.append(f"{change.name}: {error}")
        files = {test.partition("::")[0] for test in change.tests}
        problems += [f"{change.name}: no {file}" for file in sorted(files) if not (ROOT / file).is_file()]
    return problems


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """(exit code, output) of pytest on ``tests`` in ``tree``, stopped at the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0"]
    done = subprocess.run(
        [*command, "-m", DEFAULT_TIER, *tests], cwd=tree, capture_output=True, text=True, timeout=MOST_SECONDS,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def caught_by(change: Break) -> tuple[str, str] | None:
    """(first test that fails with the break, what it says); None if all pass.

    Raises CannotBreak if pytest could not run the tests, or if that one fails without the break, too.
    """
    with tempfile.TemporaryDirectory(prefix="breaks-") as place:
        tree = Path(place) / "broken"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        path = tree / change.path
        path.write_text(broken(path.read_text(encoding="utf-8"), change), encoding="utf-8")
        code, output = run_tests(tree, list(change.tests))
        match = _CAUGHT.search(output)
        if code == 0:
            return None
        if code != 1 or match is None:  # 2: a test file could not be imported; 4, 5: no such test
            raise CannotBreak(f"pytest exited {code}:\n{output[-3000:]}")
        whole = Path(place) / "whole"
        shutil.copytree(ROOT, whole, ignore=LEFT_OUT)
        function = match[1].partition("[")[0]  # with all its parameters
        code, output = run_tests(whole, [test for test in change.tests if test.startswith(function)] or [function])
        if code != 0:
            raise CannotBreak(f"{function} does not pass without the break:\n{output[-3000:]}")
    return match[1], match[2] or ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.breaks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="breaks whose names have this in them")
    parser.add_argument("--check", action="store_true", help="only look whether every break can be made")
    arguments = parser.parse_args()
    changes = [c for c in BREAKS if not arguments.only or any(text in c.name for text in arguments.only)]
    if not changes:
        parser.error("no such break; there are:\n" + "\n".join(c.name for c in BREAKS))
    if problems := check(changes):
        print("\n".join(problems))
        return 1
    if arguments.check:
        print(f"all of {len(changes)} breaks can be made")
        return 0
    missed = 0
    for change in changes:
        begin = time.monotonic()
        try:
            caught = caught_by(change)
            test, says = caught or ("nothing", "every test passes")
        except (CannotBreak, subprocess.TimeoutExpired) as error:
            caught, test, says = None, "not known", str(error)
        missed += caught is None
        print(f"| {change.name} | `{change.path}` | `{test.removeprefix('tests/')}` |")
        print(f"  {time.monotonic() - begin:.0f} s: {says}", flush=True)
    print(f"{len(changes) - missed} of {len(changes)} were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
