"""What is logged of a step that was run again, with a stepper that errs once."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from hymba_train.config.schema import GuardsConfig
from hymba_train.guards.numerics import NumericalGuard
from hymba_train.parallel.fp8_state import Fp8State
from hymba_train.train.loop import PlannedStep
from hymba_train.train.state import TrainState
from hymba_train.train.step import Gradients


class Stepper:
    """The first run of the step has no loss; it alone carries requests, and how long ranks took."""

    def __init__(self):
        self.updates = []

    def step(self, batches, requests, seconds, limits):
        first = Gradients(
            float("nan"), 1.0, 8, requests, (seconds,), torch.zeros(4), [], {"reward_margin": float("nan")}
        )
        return first, False

    def gradients(self, batches):
        return Gradients(2.0, 1.0, 8, (), (0.0,), torch.zeros(4), [], {"reward_margin": 0.25})

    def micro_batch_losses(self, gradients):
        return [[gradients.loss]]

    def update(self, gradients):
        self.updates.append(gradients.loss)


def test_the_log_of_a_step_that_was_run_again_lacks_nothing():
    runtime = SimpleNamespace(is_logging_rank=True, data_parallel_rank=0, data_parallel_size=1)
    ledger = SimpleNamespace(find=lambda *args: None)
    stepper = Stepper()
    guard = NumericalGuard(GuardsConfig(), stepper, None, runtime, TrainState(), ledger, Fp8State({}))
    planned = PlannedStep(0, "only", 0, 1, 1, 8, lr=0.1, flops_per_token=1.0)
    result = guard.step(planned, [{}], (0, 1), 0.5)
    assert stepper.updates == [2.0] and result.action == "updated" and result.event["action"] == "run again"
    assert (result.loss, result.metrics) == (2.0, {"reward_margin": 0.25})
    assert (result.requests, result.rank_seconds) == ((0, 1), (0.5,)), "of the first run, the later carry none"
