"""The next step is a function of the state."""

from __future__ import annotations

import pytest

from hymba_train.describe import training_flops
from hymba_train.errors import UserError
from hymba_train.plan.steps import plan_steps
from hymba_train.train.order import Order
from hymba_train.train.state import TrainState
from tests.train.tiny_run import tiny_config


@pytest.fixture
def order(tmp_path) -> Order:
    config = tiny_config(tmp_path)
    config.data.phases["short"].rampup_batch_size = [4, 4, 128]
    return Order(config, plan_steps(config.data.phases))


def walk(order: Order, state: TrainState) -> list:
    steps = []
    while (step := order.next(state)) is not None:
        steps.append(step)
        if step.phase != state.phase:
            state.start_phase(step.phase)
        state.advance(step.batch_size, step.seq_length)
    return steps


def test_steps_follow_phases_and_ramp(order, tmp_path):
    steps = walk(order, TrainState())
    assert [(s.phase_name, s.batch_size, s.first_sample) for s in steps] == [
        ("short", 4, 0), ("short", 4, 4), ("short", 8, 8), ("short", 8, 16), ("short", 8, 24),
        *(("long", 4, 4 * i) for i in range(6)),
    ]  # fmt: skip
    assert sum(s.tokens for s in steps) == 512 + 768
    model = tiny_config(tmp_path).model
    assert steps[0].flops_per_token == training_flops(model, 16)
    assert steps[-1].flops_per_token == training_flops(model, 32)
    first, last = steps[0], steps[-1]
    assert first.executed_flops_per_token == training_flops(model, 16, first.micro_batch_size)
    assert last.executed_flops_per_token == training_flops(model, 32, last.micro_batch_size)
    assert first.micro_batch_size > 1 and first.executed_flops_per_token < first.flops_per_token


def test_any_state_continues_the_same_way(order):
    whole = walk(order, TrainState())
    state = TrainState()
    for done in range(len(whole)):
        assert walk(order, TrainState.from_dict(state.to_dict())) == whole[done:]
        step = order.next(state)
        if step.phase != state.phase:
            state.start_phase(step.phase)
        state.advance(step.batch_size, step.seq_length)
    assert order.next(state) is None


def test_the_rate_is_that_of_the_tokens(order):
    steps, tokens = walk(order, TrainState()), 0
    for step in steps:
        assert step.lr == order.learning_rate(tokens + step.tokens / 2)
        tokens += step.tokens


def test_a_position_between_steps_is_refused(order):
    order.check(TrainState(step=3, phase=0, samples_in_phase=16))
    for phase, samples in ((0, 3), (0, 12 + 8), (1, 5), (7, 0)):
        with pytest.raises(UserError, match=f"phase number {phase} after {samples} samples"):
            order.check(TrainState(phase=phase, samples_in_phase=samples))
