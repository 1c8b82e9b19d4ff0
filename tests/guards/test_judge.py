"""Usual and unusual steps, by numbers alone."""

from __future__ import annotations

import math
import random

import pytest

from hymba_train.config.schema import GuardsConfig
from hymba_train.guards.judge import Judge
from hymba_train.guards.window import Window


def trained(num_steps: int = 64, **changes) -> Judge:
    judge, rng = Judge(GuardsConfig(**changes)), random.Random(0)
    judge.start_phase(0)
    for _ in range(num_steps):
        judge.accept(rng.gauss(3.0, 0.05), math.exp(rng.gauss(0, 0.2)))
    return judge


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_on(bad):
    judge = Judge(GuardsConfig())
    assert "loss" in judge.problem(bad, 1.0)
    assert "gradient norm" in judge.problem(3.0, bad)
    assert judge.problem(1e6, 1e6) is None, "there is no history yet"


def test_spikes_are_bad_and_noise_is_not():
    judge, rng = trained(), random.Random(1)
    assert not any(judge.problem(rng.gauss(3.0, 0.05), math.exp(rng.gauss(0, 0.2))) for _ in range(1000))
    assert "the loss is 300" in judge.problem(300.0, 1.0)
    assert "the gradient norm is 100" in judge.problem(3.0, 100.0)
    assert judge.problem(3.9, 1.0) is None, "less than loss_spike_nats above the median"
    assert judge.problem(3.0, 9.0) is None, "less than grad_spike_ratio times the median"


def test_a_noisy_history_needs_a_higher_spike():
    judge, rng = Judge(GuardsConfig()), random.Random(0)
    for _ in range(64):
        judge.accept(rng.gauss(10.0, 1.0), 1.0)
    assert judge.problem(14.0, 1.0) is None and judge.problem(40.0, 1.0)


def test_a_few_odd_values_in_the_history_move_nothing():
    window = Window(64)
    for i in range(60):
        window.add(3.0 + 0.01 * (i % 5))
    before = window.limit(10, 0.0)
    for _ in range(4):
        window.add(1000.0)
    assert window.limit(10, 0.0) < before + 0.1


def test_history_comes_back_from_plain_data():
    judge, fresh = trained(), Judge(GuardsConfig())
    judge.count_skip(60)
    fresh.load(judge.to_dict())
    assert fresh.to_dict() == judge.to_dict()
    fresh.start_phase(0)
    assert fresh.problem(300.0, 1.0)
    fresh.start_phase(1)
    assert fresh.problem(300.0, 1.0) is None, "a new phase has another usual loss"
    fresh.load(None)
    assert fresh.to_dict()["loss"] == []


def test_too_many_skips_within_the_window_end_the_run():
    judge = Judge(GuardsConfig(max_skips=2, skip_window_steps=100))
    assert judge.count_skip(10) is None and judge.count_skip(20) is None
    assert judge.count_skip(200) is None and judge.count_skip(201) is None
    assert "200, 201, 205" in judge.count_skip(205)
