"""Early stops: by file, by signal; what they leave behind. With the real loop and a fake step."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.stop import StopOnRequest
from hymba_train.outcome import OUTCOME_FILE, STOP_FILE, Outcome, clear, read_outcome, request_stop
from tests.train.test_loop import make


class At(Callback):
    """Calls ``action`` at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, loop, metrics):
        if loop.state.step == self.step:
            self.action()


@pytest.fixture
def stopper(tmp_path):
    callback = StopOnRequest(tmp_path, True)
    callback._next_look = -1e9
    return callback


@pytest.fixture(autouse=True)
def looks_at_every_step(monkeypatch):
    monkeypatch.setattr("hymba_train.callbacks.stop.SECONDS_BETWEEN_LOOKS", 0.0)


def test_a_finished_run_says_so(tmp_path, stopper):
    make([stopper]).run()
    assert read_outcome(tmp_path) == Outcome(True, 5, "all phases trained")


def test_train_steps_count_as_the_end(tmp_path, stopper):
    make([stopper], train_steps=2).run()
    assert read_outcome(tmp_path) == Outcome(True, 2, "run.train_steps reached")


def test_a_file_stops_after_the_next_step_and_is_used_up(tmp_path, stopper):
    loop = make([At(2, lambda: request_stop(tmp_path, "time limit")), stopper])
    loop.run()
    assert loop.state.step == 3 and not loop.finished
    assert read_outcome(tmp_path) == Outcome(False, 3, "time limit")
    assert not (tmp_path / STOP_FILE).exists()


def test_an_empty_file_will_do(tmp_path, stopper):
    (tmp_path / STOP_FILE).touch()
    make([stopper]).run()
    assert read_outcome(tmp_path) == Outcome(False, 1, STOP_FILE)


def test_a_request_in_the_last_step_is_no_early_stop(tmp_path, stopper):
    make([At(4, lambda: request_stop(tmp_path, "late")), stopper]).run()
    assert read_outcome(tmp_path).finished


def test_other_ranks_neither_look_nor_write(tmp_path):
    request_stop(tmp_path, "time limit")
    loop = make([StopOnRequest(tmp_path, False)])
    loop.run()
    assert loop.finished and sorted(p.name for p in tmp_path.iterdir()) == [STOP_FILE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("is_first_rank", [True, False])
def test_a_signal_to_any_rank_stops(tmp_path, number, is_first_rank):
    before = signal.getsignal(number)
    loop = make([StopOnRequest(tmp_path, is_first_rank), At(1, lambda: os.kill(os.getpid(), number))])
    loop.run()
    assert (loop.state.step, loop.stop_reason) == (2, f"signal {signal.Signals(number).name}")
    assert signal.getsignal(number) == before
    assert (tmp_path / OUTCOME_FILE).exists() == is_first_rank


def test_an_exception_leaves_no_outcome_and_the_old_handlers(tmp_path, stopper):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        make([stopper, At(2, lambda: 1 / 0)]).run()
    assert read_outcome(tmp_path) is None and signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_files_still_work(tmp_path, stopper):
    request_stop(tmp_path, "time limit")
    thread = threading.Thread(target=make([stopper]).run)
    thread.start()
    thread.join()
    assert not read_outcome(tmp_path).finished


def test_the_file_is_looked_for_once_a_second(tmp_path, stopper, monkeypatch):
    monkeypatch.setattr("hymba_train.callbacks.stop.SECONDS_BETWEEN_LOOKS", 1000.0)
    loop = make([At(1, lambda: request_stop(tmp_path, "time limit")), stopper])
    loop.run()
    assert loop.finished


def test_clear_and_damaged_outcomes(tmp_path):
    request_stop(tmp_path, "x")
    (tmp_path / OUTCOME_FILE).write_text("finished 3 done\n")
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == [] and read_outcome(tmp_path) is None
    clear(tmp_path)
    for text in ("", "finished", "finished x", "running 3", "\xff"):
        (tmp_path / OUTCOME_FILE).write_text(text)
        assert read_outcome(tmp_path) is None, text
