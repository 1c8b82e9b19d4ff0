"""Each guard once on two real ranks, in one torchrun that starts again after each fault which ends the ranks.

The long versions are in test_numerics, test_replicas and test_hangs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hymba_train.outcome import read_outcome
from tests.reliability import test_hangs as hangs
from tests.reliability import test_replicas as replicas
from tests.reliability.conftest import left_behind, torchrun
from tests.reliability.test_numerics import SAMPLE, SETTINGS, bad_run, guard_events, updates
from tests.train.test_training import OVERLAP, exact, run
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.reliability, pytest.mark.distributed, pytest.mark.timeout(900)]
TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("two_ranks")
    write_data(path)
    runs = [
        run("clean", *SETTINGS, *OVERLAP),
        bad_run("transient", "transient", "fault.rank=1", *OVERLAP),
        bad_run("rewind", "sample", f"fault.sample={SAMPLE + 3}", *OVERLAP, 'guards.on_data="rewind"'),
        bad_run("skip", "sample", f"fault.sample={SAMPLE + 3}", *OVERLAP),
        bad_run("pipeline", "sample", f"fault.sample={SAMPLE}", "parallel.pipeline=2"),
        bad_run("tensor_skip", "sample", f"fault.sample={SAMPLE}", *TENSOR),
        run("clean_tensor", *SETTINGS, *TENSOR),
        bad_run("one_rank", "transient", "fault.rank=1", *TENSOR),
        replicas.flipped("tensor"),
        hangs.hanging("stop"),
    ]
    code, output = torchrun(path, runs, restarts=2, timeout_seconds=800)
    assert code == 0, output
    (path / "output").write_text(output)
    return path


def test_the_rank_of_a_transient_fault_is_named_and_nothing_is_lost(directory):
    assert exact(directory, "transient") == exact(directory, "clean")
    (event,) = guard_events(directory, "transient")
    assert event["data_parallel_ranks"] == [1]


@pytest.mark.parametrize(("name", "place"), [("skip", (1, 1)), ("pipeline", (0, 2)), ("tensor_skip", (0, 2))])
def test_all_ranks_skip_and_name_the_micro_batch(directory, name, place):
    """Sample 87 is the last one of micro-batch 1 of rank 1; without data parallelism 84 is in micro-batch 2."""
    (event,) = guard_events(directory, name)
    (culprit,) = event["culprits"]
    assert (culprit["data_parallel_rank"], culprit["micro_batch"]) == place
    assert read_outcome(directory / "runs" / name).finished


def test_a_gradient_that_is_bad_on_one_tensor_parallel_rank_alone_is_applied_by_none(directory):
    """The loss is rank 0's, and good: only the norm, summed over the ranks, tells."""
    assert exact(directory, "one_rank") == exact(directory, "clean_tensor")
    (event,) = guard_events(directory, "one_rank")
    assert (event["action"], event["grad_norm"], event["data_parallel_ranks"]) == ("run again", None, [])
    assert event["loss"] is not None


def test_all_ranks_rewind(directory):
    assert updates(directory, "rewind") == updates(directory, "skip")


def test_a_flip_in_a_tensor_parallel_replica_is_found(directory):
    assert guard_events(directory, "clean", "drift") == []
    replicas.hold_to_promise(directory, (directory / "output").read_text(), "tensor")


def test_a_stopped_rank_is_named_and_the_job_starts_again(directory):
    assert not (directory / "runs" / "clean" / "hangs").exists(), "nothing is written while nothing hangs"
    hangs.hold_to_promise(directory, (directory / "output").read_text(), "stop")
    assert exact(directory, "stop"), "it went on"
    assert left_behind(str(directory)) == []
