"""What the ranks tell each other about a save under way, and when."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from hymba_train.checkpoint.save import CheckpointWriter, _UnderWay
from hymba_train.errors import UserError


class Process:
    """A background process of which the test says how it is."""

    said: str | None = None

    def outcome(self):
        return self.said

    def kill(self):
        self.said = self.said or "killed"


@pytest.fixture
def writer(tmp_path, lone_runtime):
    return CheckpointWriter(tmp_path, lone_runtime, [], None, lambda state: {}, True)


def begin(writer, step: int) -> Process:
    process = Process()
    writer._under_way = _UnderWay(writer.root / f"step_{step:07d}.incomplete", process, "")
    return process


@pytest.fixture
def silence(monkeypatch):
    def talks(*args, **kwargs):
        pytest.fail("the ranks talk to each other in a step")

    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, talks)


def test_a_step_needs_no_exchange_of_its_own(writer, silence):
    process = begin(writer, 5)
    assert writer.status() == (0, 1) and writer.poll(sums=(0, 2)) == []
    process.said = ""
    assert writer.status() == (0, 0) and writer.poll(sums=(0, 1)) == [], "another rank still writes"
    assert writer.status() == (0, 0)
    assert [p.name for p in writer.poll(sums=(0, 0))] == ["step_0000005"]
    assert writer.status() == (0, 0) and writer.poll(sums=(0, 0)) == [], "nothing is under way"


def test_sums_from_before_a_save_do_not_end_it(writer, silence):
    assert writer.status() == (0, 0)
    begin(writer, 5)
    assert writer.poll(sums=(0, 0)) == [] and writer._under_way is not None
    assert writer.poll() == [], "nothing is known"


def test_a_failure_of_any_rank_is_raised(writer):
    process = begin(writer, 5)
    process.said = "OSError: no"
    assert writer.status() == (1, 0)
    with pytest.raises(UserError, match="rank 0: OSError: no"):
        writer.poll(sums=(1, 0))
    assert writer.status() == (0, 0)


def test_waiting_agrees_by_itself(writer, monkeypatch):
    process = begin(writer, 5)
    looks = iter([None, None, ""])
    monkeypatch.setattr(process, "outcome", lambda: next(looks))
    assert [p.name for p in writer.poll(wait=True)] == ["step_0000005"]
