"""What logits score: the oracle is right, chance is chance, and batches do not show."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hymba_train.config.recall_kinds import RECALL_KINDS
from hymba_train.evaluation.recall import EVALUATION, draw
from hymba_train.evaluation.scoring import NUM_SUMS, RecallBatch, Task, batches, score, scores_of
from hymba_train.evaluation.symbols import Symbols
from hymba_train.plan.recall import num_questions

VOCAB = 120
SYMBOLS = Symbols(np.arange(10, 110, 2), np.arange(11, 111, 2), 1, 2, 3, 4, eod=0)


def task_of(kind: str, num_samples: int = 12) -> Task:
    return Task("one", kind, 129, 5, num_samples, 1, SYMBOLS)


def oracle(batch: RecallBatch) -> torch.Tensor:
    """Logits that are sure of the true next token, wherever one is known."""
    logits = torch.zeros(*batch.tokens.shape, VOCAB)
    return logits.scatter_(2, batch.labels.clamp(min=0)[..., None], 9.0)


def total(task: Task, predict, size: int = 4, ranks: int = 1) -> torch.Tensor:
    return sum(
        score(predict(batch), batch, task.num_buckets)
        for rank in range(ranks)
        for batch in batches(task, size, rank, ranks)
    )


@pytest.mark.parametrize("kind", RECALL_KINDS)
def test_an_oracle_is_always_right(kind):
    task = task_of(kind)
    found = scores_of(total(task, oracle).tolist())
    assert found["accuracy"] == 1.0 and found["loss"] < 0.05
    assert found["answers"] == 12 * num_questions(kind, 5)
    assert found.get("by_depth", [1.0]) == [1.0] * len(found.get("by_depth", [1.0]))


@pytest.mark.parametrize("kind", RECALL_KINDS)
def test_a_random_model_is_at_chance(kind):
    task, g = task_of(kind, 200), torch.Generator().manual_seed(0)
    found = scores_of(total(task, lambda b: torch.randn(*b.tokens.shape, VOCAB, generator=g)).tolist())
    one_token = kind in ("mqar", "selective_copy")
    chance, answers = (1 / VOCAB if one_token else VOCAB**-4), found["answers"]
    assert abs(found["accuracy"] - chance) < 4 * math.sqrt(chance / answers) + 1e-9
    assert found["loss"] == pytest.approx(math.log(VOCAB) + 0.5, abs=0.1)  # of normal logits


@pytest.mark.parametrize("kind", RECALL_KINDS)
@pytest.mark.parametrize("ranks, size", [(1, 5), (3, 2), (4, 7)])
def test_neither_batches_nor_ranks_nor_rows_that_fill_up_show(kind, ranks, size):
    task = task_of(kind, 13)
    predict = lambda batch: torch.sin(batch.tokens[..., None] * torch.arange(1, VOCAB + 1) * 0.37)  # noqa: E731
    expected = total(task, predict, 13)
    torch.testing.assert_close(total(task, predict, size, ranks), expected)
    shapes = {b.tokens.shape for rank in range(ranks) for b in batches(task, size, rank, ranks)}
    counts = {len(batches(task, size, rank, ranks)) for rank in range(ranks)}
    assert shapes == {(size, 129)} and len(counts) == 1, "collectives need as many of the same shape on every rank"


def test_one_wrong_token_spoils_an_answer_of_four_and_no_other():
    task = task_of("phonebook", 1)
    (batch,) = batches(task, 1)
    logits = oracle(batch)
    at = (batch.answers[0] == 0).nonzero()[2, 0]
    logits[0, at] = 0.0
    logits[0, at, 7] = 1.0
    two = Task("one", "phonebook", 129, 8, 1, 1, SYMBOLS)
    assert scores_of(score(logits, batch, 1).tolist())["accuracy"] == 0.0
    (batch,) = batches(two, 1)
    logits = oracle(batch)
    logits[0, (batch.answers[0] == 0).nonzero()[0, 0]] *= -1
    sums = score(logits, batch, 1).tolist()
    assert sums[0][:3] == [2, 1, 8]


def test_a_tie_and_a_nan_are_misses():
    task = task_of("mqar")
    flat = total(task, lambda b: torch.zeros(*b.tokens.shape, VOCAB))
    assert flat[0, 1] == 0 and flat[0, 0] == 60
    broken = scores_of(total(task, lambda b: torch.full((*b.tokens.shape, VOCAB), torch.nan)).tolist())
    assert broken["accuracy"] == 0 and math.isnan(broken["loss"])


def test_labels_are_the_next_tokens_and_only_answers_have_one():
    task = task_of("needle", 3)
    (batch,) = batches(task, 3)
    for row in range(3):
        sample = draw(EVALUATION, 1, "needle", 129, 5, row, SYMBOLS)
        assert batch.tokens[row].tolist() == sample.tokens.tolist() and batch.buckets[row] == row
        asked = batch.labels[row] != -100
        assert asked.sum() == 4 and (batch.labels[row][asked].numpy() == sample.tokens[1:][asked[:-1].numpy()]).all()
    assert score(oracle(batch), batch, task.num_buckets).shape == (10, NUM_SUMS)
