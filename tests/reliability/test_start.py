"""What only one rank finds wrong before training begins ends all ranks at once, with its line."""

from __future__ import annotations

import pytest

from hymba_train.outcome import read_outcome, write_outcome
from tests.reliability.test_exact_resume import LAYOUT
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.reliability, pytest.mark.distributed]

# Where, on which rank, and how the line begins.
PLACES = {
    "build_callbacks": (0, "logging.tensorboard=true"),  # loggers are built on rank 0 alone
    "build_training_data": (1, "[rank 1] logging.tensorboard=true"),
    "build_model_chunks": (1, "[rank 1] logging.tensorboard=true"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_one_rank_is_one_of_all(warm, tmp_path, place):
    """Left alone, the other rank waits for it, and is killed half a minute later (exit code -9)."""
    write_data(tmp_path)
    rank, line = PLACES[place]
    patch = f"""
import os
from hymba_train.errors import UserError
from hymba_train.train import main as training
def broken(*args, **kwargs):
    raise UserError("logging.tensorboard=true, but the package is not installed")
if os.environ["RANK"] == "{rank}":
    training.{place} = broken
"""
    warm.start(tmp_path / "runs" / "start", ranks=2, patch=patch, **LAYOUT)
    codes, output = warm.finish()
    assert codes == [2, 2], output
    assert output.count(f"UserError: {line}, but the package is not installed") == 2, output


def test_a_start_that_dies_before_it_trains_leaves_no_old_outcome(warm, tmp_path):
    write_data(tmp_path)
    path = tmp_path / "runs" / "old"
    path.mkdir(parents=True)
    write_outcome(path, "failed", 12, "10 steps skipped")
    patch = """
import os
from hymba_train.train import main as training
training.seed_everything = lambda *args: os._exit(9)
"""
    assert warm.train(path, patch=patch)[0] == 9
    assert read_outcome(path) is None
