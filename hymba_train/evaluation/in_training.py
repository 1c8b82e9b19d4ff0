"""Evaluations of the model that is being trained, under its parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.data.batches import validation_batches
from hymba_train.data.build import load_tokenizer
from hymba_train.data.dataset import TrainingData
from hymba_train.evaluation.scoring import NUM_SUMS, RecallBatch, Task, batches, make_tasks, score, scores_of
from hymba_train.evaluation.symbols import choose_symbols
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.step import MicroBatch, Stepper

Losses = dict[str, float]
Scores = dict[str, dict[str, Any]]


def make_evaluate(
    data: TrainingData, stepper: Stepper, runtime: Runtime, current_phase: Callable[[], PhaseConfig]
) -> Callable[[], Losses]:
    """A function domain -> mean loss in nats per labelled token, at the current phase's sequence length.

    It is collective. The sequences are the same every time and under every layout; the loss is exact over all ranks.
    """

    def evaluate() -> Losses:
        phase = current_phase()
        losses = {}
        for domain in data.validation_domains:
            found = validation_batches(
                data, domain, phase.seq_length, micro_batch_size=phase.micro_batch_size,
                data_parallel_rank=runtime.data_parallel_rank, data_parallel_size=runtime.data_parallel_size,
            )  # fmt: skip
            loss_sum, num_tokens = stepper.evaluate(cast(list[MicroBatch], found))  # a TypedDict is a dict
            losses[domain] = loss_sum / max(num_tokens, 1)
        return losses

    return evaluate


def make_recall(
    config: Config, stepper: Stepper, runtime: Runtime, current_phase: Callable[[], PhaseConfig]
) -> Callable[[], Scores]:
    """A function task -> scores (:func:`hymba_train.evaluation.scoring.scores_of`) on the tasks of evaluation.recall.

    It is collective, and the samples are the same every time and under every layout. Raises UserError if the tokenizer
    has too few ordinary tokens.
    """
    evaluation = config.evaluation
    tokenizer = load_tokenizer(config.data)
    tasks = make_tasks(evaluation, choose_symbols(tokenizer, evaluation.recall_symbols, evaluation.recall_separators))

    def one(task: Task, phase: PhaseConfig) -> dict[str, Any]:
        size = rows_of(task.length, phase)
        found = batches(task, size, runtime.data_parallel_rank, runtime.data_parallel_size)
        return scores_of(recall_sums(stepper, found, task.num_buckets))

    def evaluate() -> Scores:
        phase = current_phase()
        return {task.name: one(task, phase) for task in tasks}

    return evaluate


def rows_of(length: int, phase: PhaseConfig) -> int:
    """Rows of ``length`` in a micro-batch that is no larger than the phase's."""
    return max(1, phase.micro_batch_size * phase.seq_length // length)


def recall_sums(stepper: Stepper, found: Sequence[RecallBatch], buckets: int) -> list[list[float]]:
    """:func:`score` of all ranks' batches together, on every rank."""
    runtime = stepper.runtime
    inputs: list[MicroBatch] = [dict(batch.tensors()) for batch in found]
    outputs = stepper.look(inputs, Recall(buckets))
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
        asked = RecallBatch(**{name: tensor for name, tensor in batch.items() if tensor is not None})
        return nothing, nothing.int(), {"sums": score(losses, asked, self.buckets)}
