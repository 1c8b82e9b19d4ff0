"""Recall tasks tried on a model: on the one in training, and on a loaded one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hymba_train.config import compose
from hymba_train.config.choices import check_values
from hymba_train.config.schema import Config, EvaluationConfig, PhaseConfig
from hymba_train.data.batches import MicroBatch
from hymba_train.data.build import load_tokenizer
from hymba_train.data.dataset import TrainingData
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError
from hymba_train.evaluation.in_training import EvaluationInTraining, EvaluationResult
from hymba_train.evaluation.scoring import NUM_SUMS, RecallBatch, Scores, Task, batches, make_tasks, score, scores_of
from hymba_train.plan.recall import check_recall

if TYPE_CHECKING:
    from hymba_train.train.step import Stepper


def in_training(
    config: Config, data: TrainingData, stepper: Stepper, current_phase: Callable[[], PhaseConfig]
) -> EvaluationInTraining | None:
    """The tasks of evaluation.recall, every evaluation.recall_interval steps; None if there are none.

    Raises UserError if the tokenizer has too few ordinary tokens.
    """
    if not config.evaluation.recall:
        return None
    tasks, runtime = make_tasks(config.evaluation, load_tokenizer(config.data)), stepper.runtime

    def one(task: Task) -> Scores:
        size = rows_of(task.length, current_phase())
        found = batches(task, size, runtime.data_parallel_rank, runtime.data_parallel_size)
        return scores_of(recall_sums(stepper, found, task.num_buckets))

    def run() -> EvaluationResult:
        scores = {task.name: one(task) for task in tasks}
        return EvaluationResult(
            "recall",
            record={"tasks": scores},
            figures={f"{task}/{name}": found[name] for task, found in scores.items() for name in ("accuracy", "loss")},
            summary="recall: " + "  ".join(f"{task} {found['accuracy']:.1%}" for task, found in scores.items()),
        )

    return EvaluationInTraining("recall", config.evaluation.recall_interval, run)


def rows_of(length: int, phase: PhaseConfig) -> int:
    """Rows of ``length`` in a micro-batch that is no larger than the phase's."""
    return max(1, phase.micro_batch_size * phase.seq_length // length)


def recall_sums(stepper: Stepper, found: Sequence[RecallBatch], buckets: int) -> list[list[float]]:
    """:func:`score` of all ranks' batches together, on every rank."""
    runtime = stepper.runtime
    outputs = stepper.look([batch.tensors() for batch in found], Recall(buckets))
    sums = torch.zeros(buckets, NUM_SUMS, dtype=torch.float64, device=runtime.device)
    if runtime.is_last_stage and runtime.tensor_rank == 0:  # all ranks of a stage have the whole logits
        for output in outputs:
            sums += output["sums"].to(runtime.device)
    dist.all_reduce(sums)
    return sums.tolist()


@dataclass(frozen=True)
class Recall:
    """A :class:`hymba_train.train.step.Objective` that only looks: without labels the model's output are logits."""

    buckets: int
    metrics: tuple[str, ...] = ()

    def inputs(self, batch: MicroBatch) -> MicroBatch:
        return {"tokens": batch["tokens"]}

    def loss(self, batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``losses`` are logits [B, S, V] here."""
        nothing = losses.new_zeros(())
        return nothing, nothing.int(), {"sums": score(losses, RecallBatch(**batch), self.buckets)}


def tasks_of_recipe(name: str) -> EvaluationConfig:
    """The evaluation group of recipes/evaluation/``name``.yaml, checked. Raises UserError, also if it has no task."""
    config = compose([f"evaluation={name}", "model=hymba_1p5b"])
    problems = [line for line in check_values(config) if line.startswith("evaluation.")] or check_recall(config)
    if not config.evaluation.recall:
        problems = [f"--recall {name}: has no tasks; give a recipe of recipes/evaluation, e.g. recall_512"]
    if problems:
        raise UserError(*problems)
    return config.evaluation


@torch.inference_mode()
def recall_scores(
    model: Any, tokenizer: Tokenizer, evaluation: EvaluationConfig, phase: PhaseConfig, *, batch_size: int | None = None
) -> dict[str, Scores]:
    """Scores of a model on the tasks of ``evaluation``: the very samples that a run with these settings is tried on.

    Args:
        phase: its micro-batches say how many rows there are in a forward pass, unless ``batch_size`` does.

    Raises UserError if the model has another vocabulary than the tokenizer, or that one too few ordinary tokens.
    """
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the model has a vocabulary of {model.config.vocab_size}, the tokenizer {tokenizer.path} one of "
            f"{tokenizer.vocab_size}"
        )
    found = {}
    for task in make_tasks(evaluation, tokenizer):
        sums = torch.zeros(task.num_buckets, NUM_SUMS, dtype=torch.float64)
        for batch in batches(task, batch_size or rows_of(task.length, phase)):
            on_device = batch.to(model.device)
            sums += score(model(on_device.tokens).logits, on_device, task.num_buckets)
        found[task.name] = scores_of(sums.tolist())
    return found
