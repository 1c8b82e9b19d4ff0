"""From the planned steps and a state to the next step, with its learning rate and FLOPs."""

from __future__ import annotations

from hymba_train.config.schema import Config
from hymba_train.describe import training_flops
from hymba_train.errors import UserError
from hymba_train.plan.steps import StepPlan
from hymba_train.train.loop import PlannedStep
from hymba_train.train.schedules import LearningRate
from hymba_train.train.state import TrainState


class Order:
    """Implements :class:`hymba_train.train.loop.Steps`. The position is (phase, samples in it), the learning rate a
    function of the tokens trained on, whatever happened before."""

    def __init__(self, config: Config, plan: StepPlan) -> None:
        self.plan = plan
        self.learning_rate = LearningRate.of(config.schedule, config.optim, plan.num_tokens)
        shapes = {(segment.seq_length, segment.micro_batch_size) for segment in plan.segments}
        self._flops = {length: training_flops(config.model, length) for length, _ in shapes}
        self._executed = {shape: training_flops(config.model, *shape) for shape in shapes}

    def next(self, state: TrainState) -> PlannedStep | None:
        """The step after ``state``; None when every phase has been trained."""
        number = self.plan.step_at(state.phase, state.samples_in_phase)
        if number >= self.plan.num_steps:
            return None
        info = self.plan.at(number)
        return PlannedStep(
            phase=info.phase_index, phase_name=info.phase, first_sample=info.first_sample,
            batch_size=info.global_batch_size, micro_batch_size=info.micro_batch_size, seq_length=info.seq_length,
            lr=self.learning_rate.of_step(state.tokens, info.num_tokens), flops_per_token=self._flops[info.seq_length],
            executed_flops_per_token=self._executed[info.seq_length, info.micro_batch_size],
        )  # fmt: skip

    def check(self, state: TrainState) -> None:
        """Raises UserError if no step starts at ``state``, e.g. after a phase's batch size was changed."""
        try:
            self.plan.step_at(state.phase, state.samples_in_phase)
        except ValueError as error:
            raise UserError(
                f"data.phases: the checkpoint stands in phase number {state.phase} after {state.samples_in_phase} "
                "samples, where no step starts under these phases: restore that phase's global_batch_size and "
                "rampup_batch_size, or start a new run with checkpoint.load and checkpoint.load_optimizer=false"
            ) from error
