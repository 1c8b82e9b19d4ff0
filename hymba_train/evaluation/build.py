"""The evaluations of a run in training, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Callable

from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.data.dataset import TrainingData
from hymba_train.evaluation import held_out, recall_trial
from hymba_train.evaluation.in_training import EvaluationInTraining
from hymba_train.train.step import Stepper

KINDS = (held_out.in_training, recall_trial.in_training)
"""Functions of the arguments below: the evaluation, or None where the configuration asks for none."""


def evaluations_in_training(
    config: Config, data: TrainingData, stepper: Stepper, current_phase: Callable[[], PhaseConfig]
) -> list[EvaluationInTraining]:
    """Those that the configuration asks for. Raises UserError for what only shows here, such as a small tokenizer."""
    made = (make(config, data, stepper, current_phase) for make in KINDS)
    return [evaluation for evaluation in made if evaluation is not None]
