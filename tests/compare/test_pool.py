"""Processes of a comparison: signals at a bad moment, ends that are nobody's fault and those that are."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from hymba_train.compare.pool import KILLED, Clock, Pool
from hymba_train.outcome import STOP_FILE
from tests.compare.test_study import study_of


class Process:
    """Says whom it was started for, and ends with ``exitcode``."""

    def __init__(self, exitcode: int | None = None, on_start=lambda: None) -> None:
        self.exitcode, self.start = exitcode, on_start

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self) -> None:
        pass

    def kill(self) -> None:
        self.exitcode = -signal.SIGKILL


@pytest.fixture
def runs(study_dir, request):
    return study_of(study_dir, overrides=[f"run.name={request.node.name}"]).runs


def test_a_signal_while_a_run_is_being_started_reaches_it(runs):
    """Between its clean start and its process: it would train to its end, and the comparison wait for it."""
    pool = Pool(2, Clock(), lambda line: None)
    process = Process(on_start=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pool._signals():
        waiting = list(runs)
        pool._start(waiting, SimpleNamespace(Process=lambda **_: process))
    assert (runs[0].directory / STOP_FILE).read_text() == "SIGTERM\n"
    assert len(waiting) == len(runs) - 1, "and no other is started"


def test_the_time_limit_asks_all_that_train_and_starts_no_other(runs):
    pool = Pool(2, Clock(limit_seconds=100), lambda line: None)
    waiting, context = list(runs), SimpleNamespace(Process=lambda **_: Process())
    pool._start(waiting, context)
    pool._stop_in_time()
    assert not any((run.directory / STOP_FILE).exists() for run in runs), "there is time left"
    pool.clock.started -= 100 - pool.clock.margin_seconds
    pool._stop_in_time()
    assert [(run.directory / STOP_FILE).exists() for run in runs] == [True, True, False, False]
    pool._running.popitem()
    pool._start(waiting, context)
    assert waiting == list(runs[2:])


def test_what_a_second_signal_ends_has_not_failed(runs):
    said = []
    runs[0].directory.mkdir(parents=True)
    pool = Pool(1, Clock(), said.append)
    pool._running[runs[0]] = Process()
    with pool._signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert pool._running[runs[0]].is_alive()
        os.kill(os.getpid(), signal.SIGINT)
    pool._reap()
    assert pool.failures == {} and said == [f"{runs[0].name}: {KILLED}"]


def test_what_others_kill_has_failed_even_if_time_is_up(runs):
    """The kernel, for want of memory."""
    pool = Pool(1, Clock(limit_seconds=1e-9, started=-1e9), lambda line: None)
    assert pool.clock.is_over()
    pool._running[runs[0]] = Process(-signal.SIGKILL)
    pool._reap()
    assert "exit code -9" in pool.failures[runs[0].name]
