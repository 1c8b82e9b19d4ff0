"""Held-out loss by domain: of the model in training, and of a loaded one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.data.batches import validation_batches
from hymba_train.data.build import build_training_data
from hymba_train.data.dataset import TrainingData
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.errors import UserError
from hymba_train.evaluation.in_training import EvaluationInTraining, EvaluationResult

if TYPE_CHECKING:
    from hymba_train.train.step import Stepper


def in_training(
    config: Config, data: TrainingData, stepper: Stepper, current_phase: Callable[[], PhaseConfig]
) -> EvaluationInTraining | None:
    """Every logging.eval_interval steps, at the current phase's sequence length; None if no domain is held out."""

    def run() -> EvaluationResult:
        phase, runtime, losses = current_phase(), stepper.runtime, {}
        for domain in data.validation_domains:
            batches = validation_batches(
                data, domain, phase.seq_length, micro_batch_size=phase.micro_batch_size,
                data_parallel_rank=runtime.data_parallel_rank, data_parallel_size=runtime.data_parallel_size,
            )  # fmt: skip
            loss_sum, num_tokens = stepper.evaluate(batches)
            losses[domain] = loss_sum / max(num_tokens, 1)
        return result_of(losses)

    return EvaluationInTraining("validation", config.logging.eval_interval, run) if data.validation_domains else None


def result_of(losses: dict[str, float]) -> EvaluationResult:
    """``losses``: domain -> mean loss in nats per labelled token, exact over all ranks."""
    hexes = {domain: float(loss).hex() for domain, loss in losses.items()}
    return EvaluationResult(
        "validation",
        record={"loss": losses, "loss_hex": hexes},
        figures={f"{domain}/loss": loss for domain, loss in losses.items()},
        summary="held-out loss: " + "  ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items()),
    )


@dataclass(frozen=True)
class DomainLoss:
    """Loss in nats per labelled token over all held-out sequences of a domain."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def held_out_losses(
    model: Any, config: Config, phase: PhaseConfig, *, batch_size: int | None = None
) -> dict[str, DomainLoss]:
    """Loss of every validation domain of a run on exactly the sequences that training evaluates on.

    Args:
        config: the run's; its ``data`` and ``run.seed`` say which sequences.
        phase: its sequence length is taken.
        batch_size: sequences in a forward pass; None: the phase's micro-batch size.

    Raises UserError if the data is not there or nothing is held out.
    """
    data = build_training_data(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    if not data.validation_domains:
        raise UserError("data.sources: none has a validation_fraction; there is no held-out text to evaluate on")
    if model.config.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the model has a vocabulary of {model.config.vocab_size}, the run's data one of {config.model.vocab_size}"
        )
    size = batch_size or phase.micro_batch_size
    return {domain: _domain_loss(model, data, domain, phase.seq_length, size) for domain in data.validation_domains}


@torch.inference_mode()
def _domain_loss(model: Any, data: TrainingData, domain: str, seq_length: int, batch_size: int) -> DomainLoss:
    total, count = 0.0, 0
    for batch in validation_batches(data, domain, seq_length, micro_batch_size=batch_size):
        tokens, labels, mask = batch["tokens"], batch["labels"], None
        if "segment_ids" in batch:
            tokens, labels, mask = apart(tokens, labels, batch["segment_ids"])
        device = model.device
        logits = model(tokens.to(device), attention_mask=None if mask is None else mask.to(device)).logits
        flat = labels.flatten().to(device)
        total += F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORED_LABEL, reduction="sum").item()
        count += int((labels != IGNORED_LABEL).sum())
    return DomainLoss(total / max(count, 1), count)


def apart(tokens: Tensor, labels: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Documents of packed rows [B, S] as rows of their own, padded on the right: tokens, labels and mask [rows, S']."""
    pieces: list[tuple[Tensor, Tensor]] = []
    for row_tokens, row_labels, row_ids in zip(tokens, labels, segment_ids, strict=True):
        lengths = torch.unique_consecutive(row_ids, return_counts=True)[1].tolist()
        pieces += zip(row_tokens.split(lengths), row_labels.split(lengths), strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(t) for t, _ in pieces], batch_first=True)
    return (
        pad([t for t, _ in pieces], batch_first=True),
        pad([y for _, y in pieces], batch_first=True, padding_value=IGNORED_LABEL),
        mask,
    )
