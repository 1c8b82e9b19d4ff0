"""Loss and gradient of a step, against plain torch on one conversation after another with the oracle model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from data_prep.chat import ChatSettings, ConversationEncoder
from data_prep.conversations import conversation_of, pair_of
from hymba_train.config import compose
from hymba_train.data.answers import write_reference
from hymba_train.data.batches import micro_batches
from hymba_train.data.build import build_training_data
from hymba_train.data.manifest import read_manifest
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.guards.batches import emptied
from hymba_train.model import build_model_chunks
from hymba_train.oracle import OracleHymba
from hymba_train.plan import make_plan
from hymba_train.train.dpo import PreferenceLoss
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.step import Stepper
from tests.instruct import tiny

WHOLE = 8  # a batch that holds all conversations, and rows that the last batch of an epoch lacks
BETA = 0.3


class Trained:
    """The trainer's model and the oracle with the same weights."""

    def __init__(self, directory, objective: str, runtime, loss=None) -> None:
        load = {"checkpoint.load": str(directory)} if objective == "dpo" else {}
        self.config = compose(
            tiny.overrides(directory, objective, **load, **{"data.phases.only.global_batch_size": WHOLE})
        )
        plan = make_plan(self.config, 1)
        assert plan.steps.num_steps == 1
        models = build_model_chunks(self.config, runtime, [chunk.layers for chunk in plan.chunks])
        self.model = models[0]
        chunks = wrap_model(self.config, runtime, models)
        self.stepper = Stepper(runtime, chunks, build_optimizer(self.config, runtime, chunks), loss)
        self.data = build_training_data(self.config.data, seed=5, vocab_size=tiny.VOCAB)
        self.oracle = OracleHymba(self.config.model).double()
        self.oracle.load_state_dict(self.parameters(lambda p: p.data))

    def parameters(self, of) -> dict[str, torch.Tensor]:
        """By our names, in true shapes."""
        found = {}
        for name, param, description, cut in self.model.described_parameters():
            parts = [of(param).narrow(description.axis, s.local_start, s.count) for s in cut.slices]
            found[name] = torch.cat(parts, dim=description.axis) if parts else of(param)
        return found

    def batches(self, micro_batch_size: int) -> list:
        return micro_batches(self.data, 0, 0, global_batch_size=WHOLE, micro_batch_size=micro_batch_size)

    def log_prob(self, tokens: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        """Log-probability of one document's answers, alone in its row."""
        row = torch.from_numpy(tokens.astype(np.int64))[None]
        log_probs = self.oracle(row[:, :-1]).logits.log_softmax(-1)[0]
        chosen = log_probs.gather(1, row[0, 1:, None])[:, 0]
        return chosen[torch.from_numpy(mask[1:]) == 1].sum()

    def compare(self, gradients, loss: torch.Tensor) -> None:
        assert gradients.loss == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        expected = {name: p.grad for name, p in self.oracle.named_parameters()}
        norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
        assert gradients.grad_norm == pytest.approx(norm, rel=1e-4)
        for name, of_the_sum in self.parameters(lambda p: p.main_grad).items():
            found = of_the_sum / gradients.num_labelled_tokens
            error = (found - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-3, f"gradient of {name} is off by {error:.1e} of its largest value"


def encode(directory, conversations) -> list[tuple[np.ndarray, np.ndarray]]:
    tokenizer = Tokenizer.load(directory / "tokenizer")
    encoder = ConversationEncoder(ChatSettings(False, tiny.SEQ_LENGTH), tokenizer, np.uint16)
    return [encoder.encode(conversation) for conversation in conversations]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_fine_tuning_is_the_mean_over_all_answer_tokens(instruct, lone_runtime, micro_batch_size):
    trained = Trained(instruct, "sft", lone_runtime)
    gradients = trained.stepper.gradients(trained.batches(micro_batch_size))
    documents = encode(instruct, [conversation_of(record) for record in tiny.conversations()])
    num_answers = sum(int(mask.sum()) for _, mask in documents)
    assert gradients.num_labelled_tokens == num_answers, "every conversation once, rows of a short last batch never"
    loss = -sum(trained.log_prob(*document) for document in documents) / num_answers
    trained.compare(gradients, loss)


@pytest.fixture
def with_reference(instruct, tmp_path):
    """(directory with the data, reference log-probabilities [pairs, 2])."""
    shutil.copytree(instruct, tmp_path / "data")
    prefix = tmp_path / "data" / "choice"
    values = -30 - 10 * np.random.default_rng(3).random((14, 2), dtype=np.float32)
    write_reference(
        prefix, values.ravel(), {"source": read_manifest(prefix).content_hash, "checkpoint": "", "name": ""}
    )
    return tmp_path / "data", torch.from_numpy(values)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_dpo_is_the_mean_over_all_pairs(with_reference, lone_runtime, micro_batch_size):
    directory, reference = with_reference
    trained = Trained(directory, "dpo", lone_runtime, PreferenceLoss(BETA))
    gradients = trained.stepper.gradients(trained.batches(micro_batch_size))
    losses, margins = [], []
    for record, (ref_chosen, ref_rejected) in zip(tiny.pairs(), reference, strict=True):
        chosen, rejected = (trained.log_prob(*document) for document in encode(directory, pair_of(record)))
        margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        losses.append(-torch.nn.functional.logsigmoid(margin))
        margins.append(margin.item())
    assert gradients.num_labelled_tokens == 14 == len(losses)
    assert 0 < np.mean(np.array(margins) > 0) < 1, "the test needs pairs of both kinds"
    assert gradients.metrics["reward_margin"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert gradients.metrics["reward_accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    sides = gradients.metrics["reward_chosen"] - gradients.metrics["reward_rejected"]
    assert sides == pytest.approx(gradients.metrics["reward_margin"], rel=1e-4)
    trained.compare(gradients, torch.stack(losses).mean())


def test_a_pair_is_never_split(with_reference):
    directory, reference = with_reference
    config = compose(tiny.overrides(directory, "dpo", **{"checkpoint.load": str(directory)}))
    make_plan(config, 1)
    data = build_training_data(config.data, seed=5, vocab_size=tiny.VOCAB)
    seen = []
    for n in range(data.phases[0].num_samples):
        sample = data.sample(0, n)
        documents = data.sequences(0, "choice").first_documents(sample["window"])
        assert all(first % 2 == 0 for first in documents)
        assert sample["reference"].tolist() == [reference[first // 2].tolist() for first in documents]
        ids, labelled = sample["segment_ids"], sample["labels"] != -100
        assert set(ids[labelled]) == set(range(2 * len(documents))), "both sides of every pair have answers"
        for number, first in enumerate(documents):
            for side in (0, 1):
                tokens = data.sources["choice"].training.tokens.document(first + side)
                place = sample["tokens"][:-1][ids == 2 * number + side]
                assert place.tolist() == tokens[: place.size].tolist() and tokens.size - place.size <= 1
        seen += documents
    assert sorted(seen) == list(range(0, 28, 2))


def test_a_micro_batch_that_a_guard_has_emptied_counts_no_pair(with_reference):
    directory, _ = with_reference
    config = compose(tiny.overrides(directory, "dpo", **{"checkpoint.load": str(directory)}))
    make_plan(config, 1)
    data = build_training_data(config.data, seed=5, vocab_size=tiny.VOCAB)
    (batch,) = micro_batches(data, 0, 0, global_batch_size=2, micro_batch_size=2)
    losses = (batch["labels"] != -100).float()
    assert PreferenceLoss(BETA).loss(batch, losses)[1] == 4
    empty = emptied(batch)
    loss, num_pairs, logged = PreferenceLoss(BETA).loss(empty, losses * 0)
    assert loss == 0 and num_pairs == 0 and not any(logged.values())
    assert PreferenceLoss(BETA).inputs(empty).keys() == {"tokens", "labels", "positions", "segment_ids"}
