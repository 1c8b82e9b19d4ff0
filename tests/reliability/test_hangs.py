"""R11: whoever makes the others wait is named, all that can answer leave their stacks, and the job starts again."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from hymba_train.checkpoint.save import CheckpointWriter
from hymba_train.guards import marks, stacks
from hymba_train.guards.drift import DriftGuard
from hymba_train.guards.hang import Report, find_guilty, verdict
from hymba_train.outcome import read_outcome
from hymba_train.train.step import Stepper
from tests.device import ON_GPUS, patience
from tests.reliability.conftest import call, left_behind, start_of_ranks, torchrun
from tests.reliability.test_numerics import PHASE
from tests.train.test_training import ROOT, exact, run
from tests.train.tiny_run import write_data

pytestmark = pytest.mark.reliability
HANG_SECONDS = 15 if ON_GPUS else 4  # a step on GPUs may meet a kernel that is not compiled yet
IN_DISTRIBUTED = 'File "/x/torch/distributed/distributed_c10d.py", line 9 in all_reduce'
ELSEWHERE = 'File "/x/model.py", line 3 in forward'


def report(rank: int, frame: str = IN_DISTRIBUTED, **changes) -> Report:
    values = dict(
        rank=rank, host="a", pid=100 + rank, process_state="S", step=6, activity=marks.STEP, seconds=10.0,
        seconds_without_beat=0.2, collectives=50, frames=(frame,), waiting=stacks.is_waiting([frame]),
    )  # fmt: skip
    return Report(**{**values, **changes})


def test_a_silent_rank_is_guilty_before_all_others():
    found = find_guilty([report(0), report(2, ELSEWHERE)], 3)
    assert list(found) == [1] and "silent" in found[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"process_state": "T", "frames": ()}, "stopped"),
        ({"process_state": "Z", "frames": ()}, "dead"),
        ({"seconds_without_beat": 9.0}, "GIL"),
        ({"process_state": "D", "frames": ()}, "kernel"),
    ],
)
def test_a_rank_that_cannot_answer_is_guilty(changes, words):
    found = find_guilty([report(0), report(1, ELSEWHERE), report(2, **changes)], 3)
    assert list(found) == [2] and words in found[2]


def test_of_the_ranks_that_do_not_wait_the_last_one_is_guilty():
    waiting = [report(0), report(1)]
    assert list(find_guilty([*waiting, report(2, ELSEWHERE)], 3)) == [2]
    assert list(find_guilty([*waiting, report(2, ELSEWHERE), report(3, ELSEWHERE, activity=marks.LOADING)], 4)) == [3]
    assert list(find_guilty([*waiting, report(2, ELSEWHERE), report(3, ELSEWHERE, step=5)], 4)) == [3]
    # Blocked in the launch of a kernel behind a collective that hangs: it has begun more of them than the guilty one.
    assert list(find_guilty([*waiting, report(2, ELSEWHERE, collectives=44), report(3, ELSEWHERE)], 4)) == [2]


def test_nobody_is_blamed_for_the_network():
    text = verdict([report(0), report(1)], 2)
    assert "guilty: nobody" in text and "waiting for it: rank 0, 1" in text


def test_threads_of_a_dump_are_told_apart():
    dump = (
        'Thread 0x00007f506af1c6c0 (most recent call first):\n  File "/a.py", line 5 in w\n\n'
        'Current thread 0x00007f506c29fb80 [python] (most recent call first):\n  File "/b.py", line 8 in g\n'
        '  File "/b.py", line 9 in <module>\n'
    )
    assert stacks.threads(dump) == {
        0x7F506AF1C6C0: ['File "/a.py", line 5 in w'],
        0x7F506C29FB80: ['File "/b.py", line 8 in g', 'File "/b.py", line 9 in <module>'],
    }
    assert stacks.threads("") == {} and not stacks.is_waiting([])


@pytest.mark.parametrize(
    "method",
    [
        Stepper.exchange, Stepper.micro_batch_losses, Stepper.evaluate, CheckpointWriter._sums,
        CheckpointWriter._count_bytes, CheckpointWriter._finish, DriftGuard._differ, DriftGuard.check,
        torch.cuda.Event.synchronize,
    ],
    ids=lambda method: method.__qualname__,
)  # fmt: skip
def test_our_own_waits_are_known(method):
    """By the names that they really have: a rank that waits there, for others or its device, is not to blame."""
    code = inspect.unwrap(method).__code__
    frame = f'File "{code.co_filename}", line {code.co_firstlineno + 1} in {code.co_name}'
    assert stacks.is_waiting([frame])
    assert not stacks.is_waiting([frame.replace(f" in {code.co_name}", " in forward_step")])


def hanging(kind: str, *settings: str) -> list[str]:
    return run(
        kind, PHASE, f"guards.hang_seconds={HANG_SECONDS}", f"guards.hang_slow_seconds={patience(120)}",
        "logging.eval_interval=0", "checkpoint.save_interval=4", f'fault.kind="{kind}"', "fault.step=7", "fault.rank=1",
        *settings,
    )  # fmt: skip


WORDS = {"stop": "its process is stopped", "gil": "holds Python's interpreter lock", "loop": "", "loader": ""}


def hold_to_promise(directory: Path, output: str, kind: str) -> None:
    (place,) = (directory / "runs" / kind / "hangs").iterdir()
    said = (place / "verdict.txt").read_text()
    guilty = re.findall(r"guilty: (rank \d+)", said)
    assert guilty == ["rank 1"], said
    assert WORDS[kind] in said and "waiting for it: rank 0" in said
    assert all(f"hymba: hang: {line}" in output for line in said.splitlines())
    reports = [json.loads((place / f"rank_0000{r}.json").read_text()) for r in range(2)]
    happened = (directory / f"{kind}.happened").stat().st_mtime
    if kind != "loader":  # the thread that loads is steps ahead of the rank that misses its data
        # Named within the time-out plus 5 s, of which a busy machine may need more than its share.
        assert (place / "verdict.txt").stat().st_mtime - happened < HANG_SECONDS + 5 + 10
    stack = [(place / f"rank_0000{r}.txt").read_text() for r in range(2)]
    # Over gloo the host waits in the collective; over NCCL for what the device says of the step.
    waits_in = "hymba_train/train/step.py" if ON_GPUS else "torch/distributed"
    assert "most recent call first" in stack[0] and waits_in in stack[0]
    where = {"stop": "rank 1 did not answer: its process is stopped", "loader": "prefetch.py", "loop": "guarded_run.py"}
    assert where.get(kind, "guarded_run.py") in stack[1]
    assert reports[1]["activity"] == (marks.LOADING if kind == "loader" else marks.STEP)
    assert read_outcome(directory / "runs" / kind).finished, "torchrun started it again"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_endless_loop_a_held_lock_and_data_that_never_come(tmp_path):
    kinds = ("loop", "gil", "loader")
    write_data(tmp_path)
    code, output = torchrun(tmp_path, [hanging("none"), *map(hanging, kinds)], len(kinds), timeout_seconds=800)
    assert code == 0, output
    assert not (tmp_path / "runs" / "none" / "hangs").exists(), "nothing is written while nothing hangs"
    for kind in kinds:
        hold_to_promise(tmp_path, output, kind)
        assert exact(tmp_path, kind) == exact(tmp_path, "none")
    assert left_behind(str(tmp_path)) == []


@pytest.mark.distributed
@pytest.mark.slow
def test_without_the_watchdog_nothing_happens(tmp_path):
    """The control: the same fault and no guard."""
    write_data(tmp_path)
    command, env = start_of_ranks(tmp_path, 2, [hanging("stop", "guards.hang_seconds=null")], restarts=0)
    with open(tmp_path / "output", "w") as output:
        agent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + patience(200)
            while not (tmp_path / "stop.happened").exists():
                assert time.monotonic() < deadline and agent.poll() is None
                time.sleep(0.2)
            with pytest.raises(subprocess.TimeoutExpired):
                agent.wait(3 * (HANG_SECONDS + 5))
        finally:
            for process in [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]:
                process.kill()
            agent.wait()


@pytest.mark.slow
def test_a_lone_rank_that_hangs_ends_with_its_code(tmp_path):
    """Without torchrun; also: neither the monitor nor anything else outlives it."""
    write_data(tmp_path)
    settings = [s for s in hanging("loop") if "fault.rank" not in s]
    command = [sys.executable, "-m", "tests.reliability.guarded_run", str(tmp_path), *" ".join(settings).split(" ")]
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {k: v for k, v in os.environ.items() if k not in launcher} | {"RUN_OF": str(tmp_path)}
    code, output = call(command, env, timeout_seconds=150)
    assert code == 77, output
    assert "hymba: hang: guilty: rank 0" in output and "guarded_run.py" in output
    assert left_behind(str(tmp_path)) == []
