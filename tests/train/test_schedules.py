"""Learning rates, by hand-computed values."""

from __future__ import annotations

import math

import pytest

from hymba_train.config.schema import OptimConfig, ScheduleConfig
from hymba_train.train.schedules import LearningRate, set_hyperparameters


def schedule(style: str, *, warmup=0.1, decay=0.2, shape="linear", total=1000) -> LearningRate:
    config = ScheduleConfig(
        lr_decay_style=style, lr_warmup_fraction=warmup, lr_wsd_decay_fraction=decay, lr_wsd_decay_style=shape
    )
    return LearningRate.of(config, OptimConfig(lr=1.0, min_lr=0.2), total)


@pytest.mark.parametrize("style", ["wsd", "cosine", "linear", "constant"])
def test_warm_up_rises_from_zero_to_the_peak(style):
    rate = schedule(style)
    assert [rate(t) for t in (0, 25, 50, 100)] == [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("shape", "at_quarter", "at_half"),
    [
        ("linear", 0.8, 0.6),
        ("cosine", 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)), 0.6),
        ("exponential", 0.2 + 0.8 * (2 * 0.5**0.25 - 1), 0.2 + 0.8 * (math.sqrt(2) - 1)),
        ("minus_sqrt", 0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5))),
    ],
)
def test_wsd_is_stable_then_decays(shape, at_quarter, at_half):
    rate = schedule("wsd", shape=shape)
    assert [rate(t) for t in (100, 500, 799, 800)] == [1.0] * 4
    assert rate(850) == pytest.approx(at_quarter, abs=1e-12)
    assert rate(900) == pytest.approx(at_half, abs=1e-12)
    assert rate(1000) == rate(5000) == pytest.approx(0.2, abs=1e-12)


def test_cosine_and_linear_fall_from_the_end_of_warm_up():
    assert schedule("cosine")(550) == pytest.approx(0.6, abs=1e-12)
    assert schedule("cosine")(325) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)), abs=1e-12)
    assert schedule("linear")(325) == pytest.approx(0.8, abs=1e-12)
    assert schedule("cosine")(1000) == schedule("linear")(1000) == pytest.approx(0.2, abs=1e-12)


def test_constant_stays_at_the_peak():
    assert schedule("constant")(999) == schedule("constant")(10**9) == 1.0


def test_without_warm_up_or_decay_there_is_no_division_by_zero():
    assert schedule("wsd", warmup=0.0, decay=0.0)(0) == 1.0
    assert schedule("wsd", warmup=0.0, decay=0.0)(1000) == 1.0
    assert schedule("cosine", warmup=1.0)(1000) == 1.0


def test_a_step_has_the_rate_of_its_middle():
    rate = schedule("linear")
    assert rate.of_step(0, 100) == 0.5  # the first step is not wasted at 0 ...
    assert rate.of_step(900, 100) == pytest.approx(0.2 + 0.8 * 50 / 900, abs=1e-12)  # ... nor the last at the minimum


def test_rate_depends_on_tokens_alone():
    """A ramped batch size gives every token the rate that a constant one gives it."""
    rate = schedule("linear", warmup=0.0)
    small = [rate.of_step(t, 10) for t in range(0, 100, 10)]
    assert sum(small) / 10 == pytest.approx(rate.of_step(0, 100), abs=1e-12)


def test_set_hyperparameters_keeps_undecayed_groups_undecayed():
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0, "lr_mult": 0.5}]
    set_hyperparameters(groups, 0.1, 0.3)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.3), (0.05, 0.0)]
