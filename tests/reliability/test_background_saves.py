"""R13: a checkpoint written in the background holds its own step, and its writer's end is never taken for success."""

from __future__ import annotations

import os
import re
import signal

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing

from hymba_train.callbacks.jsonl import read_events
from hymba_train.checkpoint import directory, manifest
from tests.children import forks_of, has_ended
from tests.reliability.test_exact_resume import LAYOUT
from tests.reliability.test_preemption import wait_for
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.reliability, pytest.mark.distributed]
EVERY_STEP = {"checkpoint__save_interval": 1, "checkpoint__keep_last": 99, "run__train_steps": 5}
ENDS = {"raise": "ValueError: a broken writer", "exit": "exit code 17", "kill": "killed by SIGKILL"}
MOST_SECONDS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("background")
    write_data(path)
    return path


def start(warm, path, patch: str = "", **changes) -> tuple[list[int], str]:
    warm.start(path, ranks=2, patch=patch, **LAYOUT, **{**EVERY_STEP, **changes})
    return warm.finish()


def content(path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in dist_checkpointing.load_plain_tensors(str(path)).items() if isinstance(v, torch.Tensor)}


def test_each_equals_the_synchronous_one_of_its_step_and_no_other(warm, root, lone_runtime):
    saved = {}
    for name, in_background in (("background", True), ("foreground", False)):
        codes, output = start(warm, root / "runs" / name, checkpoint__async_save=in_background)
        assert codes == [0, 0], output
        saved[name] = [content(p) for p in directory.complete_steps(root / "runs" / name / "checkpoints")]
    assert len(saved["background"]) == 5
    previous = None
    for a, b in zip(saved["background"], saved["foreground"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        if previous is not None:
            changed = [k for k in a if not torch.equal(a[k], previous[k])]
            assert {"embedding", "optimizer"} <= {k.split(".")[0] for k in changed}, "holds an earlier step"
        previous = a


@pytest.mark.parametrize("how", ENDS)
def test_every_rank_learns_of_a_broken_writer_while_others_still_write(warm, root, how):
    path = root / "runs" / how
    struck = root / f"{how}.struck"
    patch = f"""
from tests.reliability import faults
faults.note_errors({str(root)!r})
faults.writer(1, {how!r}, {str(struck)!r})
"""
    codes, output = start(warm, path, patch, checkpoint__async_save=True)
    assert codes == [2, 2], output
    # The ranks share a file: a line of one may begin behind what another has written.
    lines = re.findall(r"UserError: (?:(?!UserError: ).)*", output)
    assert len(lines) == 2 and all("step_0000001" in x and f"rank 1: {ENDS[how]}" in x.replace(
        "its writing process died (", "") for x in lines), output  # fmt: skip
    for rank in range(2):
        heard = float((root / f"error.{rank}").read_text()) - float(struck.read_text())
        assert heard < MOST_SECONDS, f"rank {rank} knew after {heard:.1f} s"
    assert "saved " not in output and read_events(path / "metrics.jsonl", "checkpoint") == []
    assert list((path / "checkpoints").iterdir()) == [], "it leaves nothing that looks like a checkpoint"


def test_saved_is_said_after_publishing(warm, root):
    """The writer takes longer than the steps; every report finds its checkpoint complete."""
    path = root / "runs" / "late"
    patch = f"""
from tests.reliability import faults
faults.slow("hymba_train.checkpoint.save", "publish", 1, 1.0, {str(root / "late.slow")!r})
from hymba_train.checkpoint import manifest
from hymba_train.callbacks.checkpointing import Checkpointing
report = Checkpointing._report
def checked(self, loop, published):
    for p in published:
        assert manifest.verify(p) == [], p
    report(self, loop, published)
Checkpointing._report = checked
"""
    codes, output = start(warm, path, patch, checkpoint__async_save=True)
    assert codes == [0, 0], output
    assert [e["step"] for e in read_events(path / "metrics.jsonl", "checkpoint")] == [1, 2, 3, 4, 5]
    assert all(manifest.verify(p) == [] for p in directory.complete_steps(path / "checkpoints"))


def test_an_error_of_all_ranks_leaves_time_for_the_save_under_way(warm, root):
    path = root / "runs" / "guard"
    patch = f"""
from tests.reliability import faults
faults.slow("hymba_train.checkpoint.save", "publish", 1, 1.0, {str(root / "guard.slow")!r})
from hymba_train.errors import UserError
from hymba_train.train.loop import Loop
one_step = Loop._one_step
def failing(self, step):
    if self.state.step == 2:
        raise UserError("a guard says stop")
    return one_step(self, step)
Loop._one_step = failing
"""
    codes, output = start(warm, path, patch, checkpoint__async_save=True, checkpoint__save_interval=2)
    assert codes == [2, 2] and "a guard says stop" in output, output
    (saved,) = directory.complete_steps(path / "checkpoints")
    assert directory.step_of(saved) == 2 and manifest.verify(saved) == []


def test_a_writer_does_not_outlive_its_rank(warm, root):
    """It would go on writing into the directory that the next start writes anew."""
    marker = root / "orphan.slow"
    patch = f"""
from tests.reliability import faults
faults.slow("hymba_train.checkpoint.save", "publish", 1, 60.0, {str(marker)!r})
"""
    warm.start(root / "runs" / "orphan", patch=patch, checkpoint__async_save=True, **EVERY_STEP)
    wait_for(marker)
    rank = psutil.Process(warm.pids[0])
    (writer,) = forks_of(rank)
    os.kill(warm.pids[0], signal.SIGKILL)
    assert warm.finish()[0] == [-9]
    psutil.wait_procs([writer], timeout=10)
    assert has_ended(writer)
