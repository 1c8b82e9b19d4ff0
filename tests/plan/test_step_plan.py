"""Steps of phases and ramp-ups, against a simulation that takes one step after the other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_train.config.schema import PhaseConfig
from hymba_train.plan import StepPlan, batch_sizes, plan_steps


@st.composite
def phase_configs(draw):
    seq_length = draw(st.sampled_from([1, 7, 16]))
    batch = draw(st.integers(1, 12))
    num_samples = draw(st.integers(0, 300))
    tokens = num_samples * seq_length + draw(st.integers(0, seq_length - 1))
    ramp = None
    if batch > 1 and draw(st.booleans()):
        start = draw(st.integers(1, batch - 1))
        increment = draw(st.sampled_from([d for d in range(1, batch) if (batch - start) % d == 0]))
        ramp = [start, increment, draw(st.integers(1, max(1, tokens)))]
    return PhaseConfig(tokens=tokens, seq_length=seq_length, global_batch_size=batch, rampup_batch_size=ramp)


def simulate(phases):
    """(phase index, first sample, batch size, tokens before) of every step."""
    steps, tokens = [], 0
    for index, phase in enumerate(phases.values()):
        seen = 0
        while True:
            sizes = batch_sizes(phase)
            size = sizes[-1]
            if phase.rampup_batch_size is not None:
                share = phase.rampup_batch_size[2] / (len(sizes) - 1)
                past = sum(seen * phase.seq_length >= share * (level + 1) - 1e-9 for level in range(len(sizes) - 1))
                size = sizes[past]
            if (seen + size) * phase.seq_length > phase.tokens:
                break
            steps.append((index, seen, size, tokens))
            seen += size
            tokens += size * phase.seq_length
    return steps, tokens


@settings(max_examples=200, deadline=None)
@given(st.lists(phase_configs(), min_size=1, max_size=3))
def test_every_step_is_the_simulated_one(configs):
    phases = {f"p{i}": phase for i, phase in enumerate(configs)}
    plan = plan_steps(phases)
    steps, tokens = simulate(phases)
    assert (plan.num_steps, plan.num_tokens) == (len(steps), tokens)
    for number, expected in enumerate(steps):
        info = plan.at(number)
        assert (info.phase_index, info.first_sample, info.global_batch_size, info.tokens_before) == expected
        assert (info.phase, info.step) == (f"p{info.phase_index}", number)
        assert plan.tokens_before(number) == info.tokens_before
        assert plan.step_at(info.phase_index, info.first_sample) == number
        after = info.first_sample + info.global_batch_size
        assert plan.step_at(info.phase_index, after) == number + 1


def test_ramp_and_phases_by_hand():
    phases = {
        "stable": PhaseConfig(
            tokens=1000, seq_length=10, global_batch_size=8, micro_batch_size=2, rampup_batch_size=[4, 2, 200]
        ),
        "long": PhaseConfig(tokens=330, seq_length=20, global_batch_size=4),
    }
    plan = plan_steps(phases)
    # ramp: 10 samples at 4 (3 steps, 12 samples), up to 20 samples at 6 (2 steps, 24 samples), then 76 // 8 at 8
    assert [
        (s.global_batch_size, s.first_step, s.num_steps, s.first_sample, s.tokens_before) for s in plan.segments
    ] == [
        (4, 0, 3, 0, 0),
        (6, 3, 2, 12, 120),
        (8, 5, 9, 24, 240),
        (4, 14, 4, 0, 960),
    ]
    assert plan.at(13).first_sample == 24 + 8 * 8 and plan.at(13).num_tokens == 80
    assert plan.at(14).phase == "long" and plan.at(14).seq_length == 20
    assert plan.num_tokens == 960 + 320
    assert plan.segments[0].end_step == 3 and plan.segments[0].micro_batch_size == 2


def test_positions_that_no_step_starts_at_are_refused():
    plan = plan_steps({"a": PhaseConfig(tokens=100, seq_length=1, global_batch_size=8)})
    with pytest.raises(ValueError, match="no step starts after 7 samples"):
        plan.step_at(0, 7)
    with pytest.raises(ValueError, match="phase 1"):
        plan.step_at(1, 0)
    for step in (-1, 12):
        with pytest.raises(IndexError):
            plan.at(step)
    with pytest.raises(IndexError):
        plan.tokens_before(13)


def test_no_phases_no_steps():
    assert (StepPlan(()).num_steps, StepPlan(()).num_tokens) == (0, 0)


def test_the_published_schedule_in_numbers():
    phase = PhaseConfig(tokens=10**12, seq_length=2048, global_batch_size=1024)
    plan = plan_steps({"stable": phase})
    assert plan.num_steps == 476_837 == 10**12 // (2048 * 1024)
    assert plan.at(476_836).tokens_before == 476_836 * 2_097_152
