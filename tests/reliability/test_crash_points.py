"""R2, R3 without strace: a death at any call of a publication, and a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hymba_train.checkpoint import directory, manifest
from tests.train.test_training import ROOT, exact

pytestmark = pytest.mark.reliability

# What rank 0 does around a save, without torch, so that a death at every call can be tried in little time.
PUBLISHER = """
import os, sys
from pathlib import Path
from tests.checkpoint.test_directory import published
from hymba_train.checkpoint import directory
calls, last, root = 0, int(sys.argv[2]), Path(sys.argv[1])
def counted(name, original):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == last:
            os._exit(9)
        return original(*args, **kwargs)
    return call
directory.remove_leftovers(root)
for name in ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "write"):
    setattr(os, name, counted(name, getattr(os, name)))
Path.write_text = counted("write_text", Path.write_text)
published(root, 30)
directory.prune(root, keep_last=1, keep_every=0)
print(calls)
"""


def publish(root: Path, last_call: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PUBLISHER, str(root), str(last_call)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def hold_to_promise(root: Path, call: int) -> str:
    newest, _ = directory.newest(root)
    assert newest is not None and newest.name in ("step_0000020", "step_0000030"), call
    assert manifest.verify(newest) == [], call
    name = (root / "latest").read_text()
    assert name.strip() in ("step_0000020", "step_0000030") and name.endswith("\n"), "a torn pointer"
    return newest.name


def sweep(tmp_path: Path, every: int) -> None:
    from tests.checkpoint.test_directory import published

    published(tmp_path / "count", 10, 20)
    num_calls = int(publish(tmp_path / "count", 0).stdout)
    assert num_calls > 20
    seen = set()
    for last_call in range(1, num_calls + 1, every):
        root = tmp_path / str(last_call)
        published(root, 10, 20)
        assert publish(root, last_call).returncode == 9
        seen.add(hold_to_promise(root, last_call))
        assert publish(root, 0).returncode == 0, "the next start saves as if nothing had been"
        assert hold_to_promise(root, last_call) == "step_0000030"
    assert seen == {"step_0000020", "step_0000030"}, "the sweep did not pass the point of publication"


def test_a_death_at_some_calls_of_a_publication(tmp_path):
    sweep(tmp_path, every=6)


@pytest.mark.slow
def test_a_death_at_every_call_of_a_publication(tmp_path):
    sweep(tmp_path, every=1)


@pytest.fixture
def small_disk(tmp_path, finished):
    """A file system with room for the data of one checkpoint and a half."""
    size = sum(p.stat().st_size for p in (finished / "runs/whole/checkpoints/step_0000010").iterdir())
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.7)}", "none", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("lie", [False, True], ids=["seen_before", "seen_while_writing"])
def test_a_full_disk_is_one_clear_line_and_the_older_checkpoint_loads(warm, finished, small_disk, lie):
    name = f"full_{lie}".lower()
    patch = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 60)" if lie else ""
    code, output = warm.train(
        finished / "runs" / name, patch=patch, checkpoint__save_interval=5, run__directory=str(small_disk)
    )
    assert code == 2
    (line,) = [li for li in output.splitlines() if li.startswith("UserError")]
    assert "step_0000010" in line and "bytes are needed" in line and "are free" in line and str(small_disk) in line
    older = small_disk / name / "checkpoints" / "step_0000005"
    assert manifest.verify(older) == []
    code, output = warm.train(finished / "runs" / f"after_{name}", checkpoint__load=str(older))
    assert code == 0, output
    assert exact(finished, f"after_{name}") == exact(finished, "whole", 6)
