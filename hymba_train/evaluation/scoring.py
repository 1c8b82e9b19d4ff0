"""Recall tasks as batches of tensors, and what a model's logits score on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.config.schema import EvaluationConfig, RecallTaskConfig
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.evaluation.recall import EVALUATION, draw, num_buckets
from hymba_train.evaluation.symbols import Symbols, choose_symbols
from hymba_train.plan.recall import items_of

Scores = dict[str, Any]
"""What is reported of a task: numbers by name, and a list of them where there are several buckets."""
NUM_SUMS = 4
"""Per bucket: answers, answers that are right, answer tokens, summed loss of the answer tokens."""


@dataclass(frozen=True)
class Task:
    """A recall task with everything decided."""

    name: str
    kind: str
    length: int
    items: int
    num_samples: int
    seed: int
    symbols: Symbols

    @property
    def num_buckets(self) -> int:
        return num_buckets(self.kind)


def make_tasks(evaluation: EvaluationConfig, tokenizer: Tokenizer) -> list[Task]:
    """The tasks of evaluation.recall, in its order. Raises UserError if the tokenizer has too few ordinary tokens."""
    symbols = choose_symbols(tokenizer, evaluation.recall_symbols, evaluation.recall_separators)

    def make(name: str, task: RecallTaskConfig) -> Task:
        return Task(name, task.kind, task.length, items_of(task), task.num_samples, evaluation.recall_seed, symbols)

    return [make(name, task) for name, task in evaluation.recall.items()]


@dataclass(frozen=True)
class RecallBatch:
    """int64 tensors. A row is a whole sample (rows of other widths than training's are slower); padding rows have no
    label."""

    tokens: Tensor  # [B, length]
    labels: Tensor  # [B, length], the next token; IGNORED_LABEL where no answer is asked for
    answers: Tensor  # [B, length], number of the answer that the label belongs to
    buckets: Tensor  # [B]

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def to(self, device: torch.device | str) -> RecallBatch:
        return RecallBatch(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def batches(task: Task, size: int, data_parallel_rank: int = 0, data_parallel_size: int = 1) -> list[RecallBatch]:
    """Batches of one data-parallel rank: as many, of the same shape, on every one. Rows that fill up have no label."""
    per_turn = size * data_parallel_size
    found = []
    for turn in range(-(-task.num_samples // per_turn)):
        begin = turn * per_turn + data_parallel_rank * size
        found.append(_batch(task, range(begin, begin + size)))
    return found


def _batch(task: Task, indices: range) -> RecallBatch:
    samples = [
        draw(EVALUATION, task.seed, task.kind, task.length, task.items, min(i, task.num_samples - 1), task.symbols)
        for i in indices
    ]
    samples = [
        s if i < task.num_samples else replace(s, answers=np.full_like(s.answers, -1))
        for i, s in zip(indices, samples, strict=True)
    ]
    tokens = torch.from_numpy(np.stack([s.tokens for s in samples]))
    answers = torch.from_numpy(np.stack([s.answers for s in samples])).roll(-1, dims=1)  # no sample begins with one
    labels = tokens.roll(-1, dims=1).masked_fill(answers < 0, IGNORED_LABEL)
    return RecallBatch(tokens, labels, answers, torch.tensor([s.bucket for s in samples]))


def score(logits: Tensor, batch: RecallBatch, buckets: int) -> Tensor:
    """Sums float64 [buckets, NUM_SUMS], on the CPU, of logits [B, length, V].

    An answer is right if each of its tokens has the highest logit of all, alone: what greedy decoding would say. A tie
    is a miss, on every device.
    """
    asked = batch.labels != IGNORED_LABEL
    chosen, labels = logits[asked].float(), batch.labels[asked]
    hit = (chosen >= chosen.gather(1, labels[:, None])).sum(1) == 1
    loss = F.cross_entropy(chosen, labels, reduction="none")
    # The rest on the CPU, where sums have an order.
    hit, loss = hit.double().cpu(), loss.double().cpu()
    of_row = batch.buckets.cpu()
    rows, answers = asked.nonzero()[:, 0].cpu(), batch.answers[asked].cpu()
    num_rows, width = batch.tokens.shape
    right = torch.full((num_rows * width,), 2.0, dtype=torch.float64)  # 2: no such answer
    right.scatter_reduce_(0, rows * width + answers, hit, "amin")  # an answer is as right as its worst token
    right = right.view(num_rows, width)
    is_answer = right < 2
    sums = torch.zeros(buckets, NUM_SUMS, dtype=torch.float64)
    sums[:, :2].index_add_(0, of_row, torch.stack([is_answer.sum(1).double(), (right * is_answer).sum(1)], dim=1))
    sums[:, 2:].index_add_(0, of_row[rows], torch.stack([torch.ones_like(loss), loss], dim=1))
    return sums


def scores_of(sums: Sequence[Sequence[float]]) -> Scores:
    """What is reported of a task: ``accuracy`` (share of answers that are right), ``loss`` (nats per answer token),
    ``answers`` (how many were asked for); over several buckets ``by_depth`` as well, accuracies from front to back."""
    answers, right, tokens, loss = (sum(column) for column in zip(*sums, strict=True))
    found: Scores = {
        "accuracy": right / max(answers, 1), "loss": loss / tokens if tokens else math.nan, "answers": int(answers),
    }  # fmt: skip
    if len(sums) > 1:
        found["by_depth"] = [row[1] / row[0] if row[0] else math.nan for row in sums]
    return found
