"""Starts that never get anywhere are counted, and refused in the end."""

from __future__ import annotations

import json

import pytest

from hymba_train.guards.starts import (
    STARTS,
    Starts,
    failed_before,
    forget_earlier_outcome,
    too_many_starts,
)
from hymba_train.outcome import write_outcome


def start(directory, loop_of, step: int) -> None:
    loop = loop_of(Starts(directory))
    loop.state.step = step
    loop.start()


def test_starts_from_the_same_step_are_refused_after_the_limit(tmp_path, loop_of):
    for _ in range(3):
        assert too_many_starts(tmp_path, 40, 3) is None
        start(tmp_path, loop_of, 40)
    reason = too_many_starts(tmp_path, 40, 3)
    assert "3 starts in a row from step 40" in reason and str(tmp_path / STARTS) in reason
    assert too_many_starts(tmp_path, 50, 3) is None, "a checkpoint later there is progress"


def test_an_end_in_good_order_is_a_new_beginning(tmp_path, loop_of):
    for _ in range(2):
        start(tmp_path, loop_of, 40)
    loop = loop_of(Starts(tmp_path))
    loop.state.step = 40
    loop.start()
    loop.end()
    assert too_many_starts(tmp_path, 40, 3) is None
    start(tmp_path, loop_of, 40)
    assert too_many_starts(tmp_path, 40, 1) is not None


def test_a_torn_line_costs_only_itself(tmp_path, loop_of):
    start(tmp_path, loop_of, 0)
    with open(tmp_path / STARTS, "a") as file:
        file.write('{"from_st')
    start(tmp_path, loop_of, 0)
    lines = (tmp_path / STARTS).read_text().splitlines()
    assert json.loads(lines[0])["from_step"] == json.loads(lines[2])["from_step"] == 0
    assert too_many_starts(tmp_path, 0, 2) is not None


@pytest.mark.parametrize(
    ("restart", "word", "gives_up"), [(1, "failed", True), (0, "failed", False), (1, "stopped", False)]
)
def test_torchrun_does_not_start_again_what_a_guard_has_ended(tmp_path, monkeypatch, restart, word, gives_up):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    write_outcome(tmp_path, word, 12, "10 steps skipped")
    assert failed_before(tmp_path) == ("10 steps skipped" if gives_up else None)


def test_the_failure_of_an_earlier_job_is_no_verdict_on_this_one(tmp_path, monkeypatch):
    """The new job's first process dies before it trains: torchrun's restart of it goes on."""
    write_outcome(tmp_path, "failed", 12, "10 steps skipped")
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        assert failed_before(tmp_path) is None
        forget_earlier_outcome(tmp_path)
    write_outcome(tmp_path, "failed", 12, "by this job")
    forget_earlier_outcome(tmp_path)
    assert failed_before(tmp_path) == "by this job"
