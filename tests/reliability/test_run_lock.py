"""R8: one training at a time in a run directory, and none is locked out by a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from hymba_train.checkpoint.run_lock import RunLock
from hymba_train.errors import UserError

pytestmark = pytest.mark.reliability
# Torch-free: starts in a fraction of a second. With an argument it forks a child that outlives it, like a save.
OWNER = """
import os, sys, time
from pathlib import Path
from hymba_train.checkpoint.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
child = os.fork() if len(sys.argv) > 2 else 1
if child: print("held", child, flush=True)
time.sleep(60)
"""


def owner(path, *arguments: str) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path), *arguments], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "SLURM_JOB_ID": "4711"},
    )  # fmt: skip
    word, child = process.stdout.readline().split()
    assert word == "held"
    return process, int(child)


def test_a_second_training_is_refused_at_once_with_the_owners_name(tmp_path):
    process, _ = owner(tmp_path)
    begin = time.monotonic()
    try:
        with pytest.raises(UserError) as error:
            RunLock(tmp_path)
        assert time.monotonic() - begin < 5
    finally:
        process.kill()
        process.wait()
    (line,) = error.value.problems
    assert f"pid {process.pid}" in line and "job 4711" in line and os.uname().nodename in line and "since 20" in line


def test_a_killed_owner_does_not_lock_anybody_out(tmp_path):
    process, _ = owner(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lock = RunLock(tmp_path, patience_seconds=0)
    assert f'"pid": {os.getpid()}' in (tmp_path / "run.lock").read_text()
    lock.release()


def test_nor_does_a_forked_writer_that_outlives_it(tmp_path):
    process, child = owner(tmp_path, "fork")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        os.kill(child, 0)  # it is alive, if not yet running: it lets go in its first moment
        RunLock(tmp_path, patience_seconds=30).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_unreadable_owner_is_still_an_owner(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / "run.lock").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="owner unknown"):
        RunLock(tmp_path, patience_seconds=0)
    lock.release()
    RunLock(tmp_path, patience_seconds=0).release()
