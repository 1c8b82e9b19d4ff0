"""Slow ranks are named by their own time, not by the step's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hymba_train.guards.stragglers import MIN_STEPS, WARM_UP_STEPS, Stragglers


@pytest.fixture
def stragglers(lone_runtime, monkeypatch):
    runtime = SimpleNamespace(device=torch.device("cpu"), world_size=4, rank=0)
    finished = []
    settings = SimpleNamespace(finalize_model_grads_func=lambda *args: finished.append(args))
    hosts = [f"node{rank}" for rank in range(4)]
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, mine: out.__setitem__(slice(None), hosts))
    made = Stragglers(runtime, settings, ratio=1.3)
    made.settings, made.finished = settings, finished
    return made


def steps(loop, count: int, seconds: tuple[float, ...]) -> list[dict]:
    for _ in range(count):
        loop.step(loop.state.step + 1, rank_seconds=seconds)
    return [args[0] for event, *args in loop.emitted if event == "on_guard"]


def test_the_slow_rank_is_named_with_its_host(stragglers, loop_of):
    loop = loop_of(stragglers)
    loop.start()
    assert steps(loop, WARM_UP_STEPS, (9.0, 1.0, 1.0, 1.0)) == [], "kernels are compiled meanwhile"
    (event,) = steps(loop, MIN_STEPS + 1, (1.0, 1.0, 1.0, 1.8))
    assert event["guard"] == "straggler" and event["ranks"] == [3]
    assert "rank 3 on node3 (1.80x)" in event["problem"]


def test_equal_ranks_are_not_named(stragglers, loop_of):
    loop = loop_of(stragglers)
    loop.start()
    assert steps(loop, 3 * MIN_STEPS, (1.0, 1.1, 1.2, 1.0)) == []


def test_a_ranks_own_time_ends_where_it_waits_for_others(stragglers, loop_of, monkeypatch):
    clock = iter([0.0, 2.0, 5.0])  # begun, data there, gradients ready
    monkeypatch.setattr("hymba_train.guards.stragglers.time.monotonic", lambda: next(clock))
    stragglers.on_step_start(None)
    stragglers.on_batch_loaded(None)
    stragglers.settings.finalize_model_grads_func("model")
    loop = loop_of()
    loop.step(1)
    stragglers.on_step_end(loop, SimpleNamespace(rank_seconds=()))
    assert stragglers.seconds == 5.0 and stragglers.finished == [("model",)]
