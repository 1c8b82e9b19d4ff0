"""R5: a signal to a rank or to torchrun, whatever the training does just then, loses no step."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hymba_train.checkpoint import directory, manifest
from hymba_train.exit_codes import STOPPED_EARLY
from hymba_train.outcome import read_outcome
from tests.children import child_environment, has_ended
from tests.device import OVERRIDES, patience, training_variables
from tests.distributed.test_resume import COMMON
from tests.reliability.test_exact_resume import LAYOUT
from tests.train.test_training import ROOT, events, exact
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.reliability, pytest.mark.distributed]
SAVES = {"checkpoint__save_interval": 3, "checkpoint__async_save": True}
# A function, and the call of it that takes long.
MOMENTS = {
    "step": ("hymba_train.train.step", "Stepper._apply", 5),
    "save": ("hymba_train.checkpoint.save", "write_share", 1),
    "evaluation": ("hymba_train.train.step", "Stepper.evaluate", 1),
}
SLOW_SECONDS = 1.5


@pytest.fixture(scope="module")
def root(warm, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preemption")
    write_data(path)
    warm.start(path / "runs" / "whole", ranks=2, **SAVES, **LAYOUT)
    codes, output = warm.finish()
    assert codes == [0, 0], output
    return path


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def preempt(warm, root: Path, moment: str, number: signal.Signals, rank: int, times: int = 1) -> None:
    name = f"{moment}_{number.name}_{rank}_{times}"
    module, function, call = MOMENTS[moment]
    marker = root / f"{name}.now"
    patch = f"""
from tests.reliability import faults
for rank in range(2):
    marker = {str(marker)!r} + ("" if rank == {rank} else "x")
    faults.slow({module!r}, {function!r}, {call}, {SLOW_SECONDS}, marker, rank)
"""
    warm.start(root / "runs" / name, ranks=2, patch=patch, **SAVES, **LAYOUT)
    wait_for(marker)
    for _ in range(times):
        os.kill(warm.pids[rank], number)
        time.sleep(0.1)
    codes, output = warm.finish()
    assert codes == [STOPPED_EARLY, STOPPED_EARLY], output
    outcome = read_outcome(root / "runs" / name)
    assert not outcome.finished
    newest, remarks = directory.newest(root / "runs" / name / "checkpoints")
    assert directory.step_of(newest) == outcome.step == max(events(root, name)) and remarks == []
    assert manifest.verify(newest) == []
    warm.start(root / "runs" / name, ranks=2, **SAVES, **LAYOUT)
    codes, output = warm.finish()
    assert codes == [0, 0], output
    assert f"continuing after step {outcome.step} " in output, "a step was lost"
    assert exact(root, name) == exact(root, "whole")


@pytest.mark.parametrize(
    ("moment", "number", "rank"),
    [("step", signal.SIGTERM, 1), ("save", signal.SIGUSR1, 0), ("evaluation", signal.SIGTERM, 1)],
)
def test_a_signal_to_one_rank(warm, root, moment, number, rank):
    preempt(warm, root, moment, number, rank)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_signal_to_every_rank_at_every_moment_once_and_twice(warm, root):
    for moment, number, rank, times in itertools.product(MOMENTS, (signal.SIGTERM, signal.SIGUSR1), (0, 1), (1, 2)):
        preempt(warm, root, moment, number, rank, times)


class PortTaken(Exception):
    """torchrun chooses a port for its ranks seconds before they listen on it; on a busy machine another takes it."""


def stop_agent(path: Path, number: signal.Signals) -> tuple[int, list[psutil.Process], str]:
    """(exit code of torchrun, its processes that are still there, output) after a signal in the middle of a run."""
    write_data(path / "data")
    many = [
        f"run.directory={path}", f"data.path={path / 'data'}", "run.train_steps=null",
        "data.phases={a: {tokens: 64000000, seq_length: 16, global_batch_size: 4, blend: {odd: 1}}}",
        "checkpoint.save_interval=7", "logging.eval_interval=0",
    ]  # fmt: skip
    env = child_environment(**training_variables())
    log = path / "output"
    with open(log, "w") as output:
        command = [sys.executable, "-m", "hymba_train", "train", "--nproc", "2", *COMMON, *many, *OVERRIDES]
        agent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
    ranks: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + patience(240)
        while '"step": 3,' not in _read(path / "run" / "metrics.jsonl"):
            if agent.poll() is not None and "EADDRINUSE" in log.read_text():
                raise PortTaken
            assert agent.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        ranks = psutil.Process(agent.pid).children(recursive=True)
        assert len(ranks) >= 2
        agent.send_signal(number)
        code = agent.wait(120)
        if number == signal.SIGKILL:  # nobody waits for the ranks now
            psutil.wait_procs(ranks, timeout=60)
        return code, [p for p in ranks if not has_ended(p)], log.read_text()
    finally:
        for process in [agent, *ranks]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGUSR1, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
    ids=["SIGUSR1", "SIGTERM", "SIGKILL"],
)
def test_a_signal_to_torchrun(tmp_path, number, code):
    for attempt in range(3):
        try:
            found, orphans, output = stop_agent(tmp_path / str(attempt), number)
            break
        except PortTaken:
            continue
    tmp_path /= str(attempt)
    assert orphans == [], output
    assert found == code, output
    outcome = read_outcome(tmp_path / "run")
    assert outcome is not None and not outcome.finished, output
    newest, remarks = directory.newest(tmp_path / "run" / "checkpoints")
    assert directory.step_of(newest) == outcome.step and remarks == [] and manifest.verify(newest) == []
