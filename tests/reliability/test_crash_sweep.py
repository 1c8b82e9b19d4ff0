"""R2, R3: a death or an error at any system call of a save. Nothing is lost but steps since the last checkpoint.

strace kills a training, or the process that writes for it, at its n-th call, or lets that call fail.
"""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from hymba_train.checkpoint import directory, manifest
from tests.train.test_training import exact
from tests.train.tiny_run import write_data
from tests.warm import Strace, Warm, why_no_strace

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(3600)]
MOST_SECONDS = 30  # of an answer to an error
numbers = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def strace_works():
    if why_no_strace():
        pytest.skip(why_no_strace())


@pytest.fixture(scope="module")
def root(warm, tmp_path_factory) -> Path:
    """Data, an undisturbed run ``whole``, and a run ``base`` that stands at step 4."""
    path = tmp_path_factory.mktemp("sweep")
    write_data(path)
    code, output = warm.train(path / "runs" / "whole", checkpoint__save_interval=2, checkpoint__keep_last=9)
    assert code == 0, output
    shutil.copytree(path / "runs" / "whole", path / "runs" / "base")
    checkpoints = path / "runs" / "base" / "checkpoints"
    for step in (6, 8, 10):
        shutil.rmtree(checkpoints / directory.step_name(step))
    (checkpoints / "latest").write_text("step_0000004\n")
    (path / "runs" / "base" / "outcome").unlink()
    return path


def save_step_6(warm: Warm, root: Path, who: str, inject: str = "", patch: str = "") -> tuple[str, int, str, list[str]]:
    """(name, exit code, output, calls) of a copy of ``base`` that goes on, and is traced from its save of step 6 on."""
    name = f"run{next(numbers)}"
    shutil.copytree(root / "runs" / "base", root / "runs" / name)
    strace = Strace(root / f"{name}.trace", inject)
    code, output = warm.train(
        root / "runs" / name, pause=who, on_pause=strace.attach, patch=patch,
        checkpoint__save_interval=6, checkpoint__keep_last=2,
    )  # fmt: skip
    return name, code, output, strace.calls()


def points(warm: Warm, root: Path, who: str, patch: str = "") -> list[tuple[str, str]]:
    """(strace's name for it, text) of the calls of one save that touch the run, up to the report of its success."""
    _, code, output, calls = save_step_6(warm, root, who, patch=patch)
    assert code == 0, output
    end = next((i for i, call in enumerate(calls) if '"saved ' in call), len(calls))
    found, seen = [], Counter()
    for call in calls[:end]:
        name = call.partition("(")[0]
        seen[name] += 1  # strace counts every call by itself
        if str(root) in call:
            found.append((f"{name}:when={seen[name]}", call))
    return found


def hold_to_promise(warm: Warm, root: Path, name: str, what: str) -> int:
    """The newest checkpoint is whole, and the run goes on from it as if nothing had been. Returns its step."""
    checkpoints = root / "runs" / name / "checkpoints"
    newest, remarks = directory.newest(checkpoints)
    assert newest is not None and directory.step_of(newest) in (4, 6, 10), what
    assert remarks == [] and re.fullmatch(r"step_00000\d\d\n", (checkpoints / "latest").read_text()), f"torn: {what}"
    assert manifest.verify(newest) == [], what
    code, output = warm.train(root / "runs" / name, checkpoint__save_interval=6)
    assert code == 0, f"{what}\n{output}"
    assert exact(root, name) == exact(root, "whole"), what
    assert not [p for p in checkpoints.iterdir() if p.name not in ("latest", *map(directory.step_name, range(20)))]
    shutil.rmtree(root / "runs" / name)
    return directory.step_of(newest)


def kill_at(warm: Warm, root: Path, who: str, every: int) -> None:
    expected = {"training": -9, "writer": 2}[who]
    steps = set()
    every_point = points(warm, root, who)
    for point, call in [*every_point[:-1:every], every_point[-1]]:
        name, code, output, _ = save_step_6(warm, root, who, f"{point}:signal=KILL")
        assert code == expected, f"{call}\n{output}"
        if who == "writer":
            assert "its writing process died (killed by SIGKILL)" in output and "step_0000006" in output, output
        steps.add(hold_to_promise(warm, root, name, f"{who} killed at {call}"))
    assert steps == {4, 6}, "the sweep missed one side of the publication"


def fail_at(warm: Warm, root: Path, who: str, chosen: list[tuple[str, str]]) -> None:
    seen: list[str] = []
    for (point, call), error in zip(chosen, itertools.cycle(("EIO", "ENOSPC"))):
        begin = time.monotonic()
        name, code, output, _ = save_step_6(warm, root, who, f"{point}:error={error}")
        assert time.monotonic() - begin < MOST_SECONDS + 30, call  # a loaded machine needs seconds for a good run, too
        what = f"{error} at {call}\n{output}"
        seen.append(call)
        # After the publication, and where an error is only the word for "it is there" or "it is gone".
        published = any("rename" in c and '/latest"' in c for c in seen[:-1]) or re.search(r'/step_0000006[">]', call)
        harmless = any(word in call for word in ("mkdir", "rmdir", "unlink", ".deleted", "stop_requested"))
        assert code == 2 or (code == 0 and (published or harmless)), what
        if code == 2:
            (line,) = [x for x in output.splitlines() if x.startswith("UserError")]
            assert str(root) in line and "bytes are needed" in line and "are free" in line, what
            assert ("no room" in line) == (error == "ENOSPC") and "step_0000006" in line, what
        hold_to_promise(warm, root, name, what)


def some(calls: list[tuple[str, str]], *words: str) -> list[tuple[str, str]]:
    """The first call of each kind."""
    return [next((point, c) for point, c in calls if re.search(word, c)) for word in words]


def test_the_writer_killed_at_some_calls(warm, root):
    kill_at(warm, root, "writer", every=18)


def test_the_training_killed_at_some_calls(warm, root):
    kill_at(warm, root, "training", every=7)


def test_errors_at_some_calls(warm, root):
    calls = points(warm, root, "writer")
    fail_at(warm, root, "writer", some(calls, r"^write.*distcp", r"^fsync.*distcp", r"^rename.*step_0000006\""))
    fail_at(warm, root, "training", some(points(warm, root, "training"), r"^mkdir.*incomplete"))


def test_a_pointer_that_is_written_in_place_is_found_torn(warm, root):
    """Control: without the temporary file and the rename, a death between open and write tears the pointer."""
    patch = "import hymba_train.checkpoint.directory as d; d.write_atomically = lambda p, text: p.write_text(text)"
    point, call = some(points(warm, root, "writer", patch), r"^write.*latest>")[0]
    name, *_ = save_step_6(warm, root, "writer", f"{point}:signal=KILL", patch)
    with pytest.raises(AssertionError):
        hold_to_promise(warm, root, name, call)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["writer", "training"])
def test_killed_at_every_call(warm, root, who):
    kill_at(warm, root, who, every=1)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["writer", "training"])
def test_an_error_at_every_call(warm, root, who):
    fail_at(warm, root, who, points(warm, root, who))
