"""Passes that go through a recorder: with a stand-in for the GPU's, which runs again what it was given."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.model import build_model_chunks
from hymba_train.train.graph import EAGER_STEPS, GraphedPasses, Recording, record, work_on_own_stream
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.schedules import set_hyperparameters
from hymba_train.train.step import Stepper
from tests.train.tiny_run import tiny_config

CPU = torch.device("cpu")


class Tape:
    """Like a graph's: nothing runs while it records; a replay overwrites what the one before has returned."""

    made: list[Tape]

    def __init__(self, body):
        self.body, self.replays, self.reset_called, self.outputs = body, 0, False, {}
        Tape.made.append(self)

    @classmethod
    def record(cls, body) -> Recording:
        tape = cls(body)
        return Recording(tape, tape.outputs, 5)

    def replay(self):
        assert not self.reset_called
        self.replays += 1
        for name, value in self.body().items():
            self.outputs.setdefault(name, value).copy_(value)

    def reset(self):
        self.reset_called = True


@pytest.fixture(autouse=True)
def no_tapes():
    Tape.made = []


def batches_of(step: int, count: int = 2, seq: int = 16) -> list[dict]:
    tokens = torch.randint(0, 96, (count, 2, seq + 1), generator=torch.Generator().manual_seed(step))
    labels = tokens[:, :, 1:].clone()
    labels[:, :, : step % 5] = -100  # as many labels in no two steps
    return [{"tokens": t[:, :-1], "labels": row} for t, row in zip(tokens, labels, strict=True)]


def stepper_of(directory, runtime, graphed=None) -> Stepper:
    config = tiny_config(directory)
    (model,) = build_model_chunks(config, runtime, [range(config.model.num_layers)])
    chunks = wrap_model(config, runtime, [model])
    optimizer = build_optimizer(config, runtime, chunks)
    set_hyperparameters(optimizer.param_groups, 0.01, 0.1)
    return Stepper(runtime, chunks, optimizer, graphed=graphed)


def train(stepper: Stepper) -> list[tuple]:
    """Eight steps, five of another shape, two of another RoPE base; two evaluations; a step that is run twice."""
    found = []
    for step in range(8):
        found.append(stepper.train(batches_of(step)))
    found.append(stepper.evaluate(batches_of(50, count=3)))
    for step in range(8, 13):
        found.append(stepper.train(batches_of(step, count=3, seq=24)))
    stepper.chunks[0].module.rotary_base *= 2
    found += [stepper.train(batches_of(step, count=3, seq=24)) for step in (13, 14)]
    found.append(stepper.evaluate(batches_of(51)))
    again = [stepper.gradients(batches_of(step, count=3, seq=24)) for step in (15, 16, 15)]
    losses = [stepper.micro_batch_losses(gradients) for gradients in again]
    assert losses[0] == losses[2] != losses[1]
    stepper.update(again[2])
    return [*found, losses, stepper.train(batches_of(17, count=3, seq=24))]


def test_steps_are_equal_bit_for_bit(tmp_path, lone_runtime):
    graphed = GraphedPasses(CPU, record=Tape.record)
    assert train(stepper_of(tmp_path, lone_runtime, graphed)) == train(stepper_of(tmp_path, lone_runtime))
    replays = [tape.replays for tape in Tape.made]
    # The last key: 2 steps, 3 runs of one step and 1 step, of which the first EAGER_STEPS are not recorded.
    assert replays == [8 - EAGER_STEPS, 5 - EAGER_STEPS, 6 - EAGER_STEPS]
    assert [tape.reset_called for tape in Tape.made] == [True, True, False], "a new key, and the old memory is free"


def test_without_the_key_nothing_is_recorded(tmp_path, lone_runtime, monkeypatch):
    monkeypatch.setattr(GraphedPasses, "__call__", None)
    stepper = stepper_of(tmp_path, lone_runtime)
    for step in range(EAGER_STEPS + 2):
        stepper.train(batches_of(step))
    assert Tape.made == []


def doubled(graphed: GraphedPasses, value: float, settings=0, size: int = 1) -> list[dict]:
    def run(batches):
        return [
            {"loss_sum": 2 * batch["x"].sum(), "num_tokens": batch["x"].numel() + torch.tensor(0)} for batch in batches
        ]

    return graphed(settings, [{"x": torch.full((size,), value)}], run)


def test_results_outlive_the_next_replay(lone_runtime):
    graphed = GraphedPasses(CPU, record=Tape.record)
    found = [doubled(graphed, float(value))[0]["loss_sum"] for value in range(6)]
    assert [x.item() for x in found] == [0, 2, 4, 6, 8, 10] and Tape.made[0].replays == 6 - EAGER_STEPS


@pytest.mark.parametrize("change", [{"settings": 1}, {"size": 2}])
def test_another_key_is_another_graph(lone_runtime, change):
    graphed = GraphedPasses(CPU, record=Tape.record)
    assert graphed.num_bytes == 0
    for _ in range(EAGER_STEPS + 1):
        doubled(graphed, 1.0)
    assert graphed.num_bytes == 5 and len(Tape.made) == 1
    doubled(graphed, 1.0, **change)
    assert Tape.made[0].reset_called and graphed.num_bytes == 0, "dropped before the pass that needs the memory"
    for _ in range(EAGER_STEPS):
        doubled(graphed, 1.0, **change)
    assert len(Tape.made) == 2 and Tape.made[1].replays == 1
    graphed.drop()
    assert Tape.made[1].reset_called


def test_what_the_graph_uses_is_kept_as_long_as_it_lives(lone_runtime):
    made = []

    def keep():
        made.append(torch.zeros(1))
        return made[-1:]

    graphed = GraphedPasses(CPU, keep, Tape.record)
    for _ in range(EAGER_STEPS + 2):
        doubled(graphed, 1.0)
    assert [id(x) for x in graphed._kept] == [id(x) for x in made] and len(made) == 2, "before and after recording"
    graphed.drop()
    assert graphed._kept == []


def test_a_failure_names_the_way_out(lone_runtime, caplog):
    def fail(body):
        raise RuntimeError("operation not permitted")

    graphed = GraphedPasses(CPU, record=fail)
    for _ in range(EAGER_STEPS):
        doubled(graphed, 1.0)
    with pytest.raises(UserError, match=r"\(operation not permitted\); set run.cuda_graph=false"):
        doubled(graphed, 1.0)
    assert "Traceback" in caplog.text


def test_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"runs on cpu: set run\.cuda_graph=false"):
        work_on_own_stream(CPU)


@pytest.mark.parametrize("collects", [True, False])
def test_a_recording_leaves_the_garbage_collector_as_it_was(collects, monkeypatch):
    """A training has switched it off, and collects at steps of its own."""
    seen = []
    fakes = {
        "CUDAGraph": object, "graph": lambda *args, **kwargs: contextlib.nullcontext(), "current_stream": lambda: None,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 3, "max_memory_allocated": lambda: 10,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        assert record(lambda: seen.append(gc.isenabled()) or {}).num_bytes == 7
        assert seen == [False] and gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
