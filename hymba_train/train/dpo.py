"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290) on packed pairs.

A row of a micro-batch holds pairs of documents, the chosen answer and the rejected one, each behind its prompt:
documents 2p and 2p + 1 of the row. Their log-probabilities are sums over the answers' tokens, which are the only ones
with a label; those of the model that training starts from come with the data (:class:`hymba_train.data.answers.
Reference`), so there is no second model in memory and no second pass, whatever the layout.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hymba_train.checkpoint.load import Source
from hymba_train.checkpoint.manifest import MANIFEST
from hymba_train.config.schema import Config
from hymba_train.data.answers import reference_path
from hymba_train.data.batches import MicroBatch
from hymba_train.data.dataset import TrainingData
from hymba_train.data.manifest import file_sha256
from hymba_train.errors import UserError


def document_sums(losses: Tensor, batch: MicroBatch, num_documents: int) -> tuple[Tensor, Tensor]:
    """Sums over the documents of each row: (losses float32 [B, D], labelled tokens int64 [B, D]).

    losses: float32 [B, S], zero where there is no label. Document numbers from D on (padding) are left out.
    """
    # Not scatter_add: on a GPU its sums depend on the order in which threads come.
    numbers = torch.arange(num_documents, device=losses.device)
    inside = batch["segment_ids"].unsqueeze(-1) == numbers  # [B, S, D]
    sums = torch.where(inside, losses.unsqueeze(-1), 0.0).sum(dim=1)
    return sums, (inside & (batch["labels"] != -100).unsqueeze(-1)).sum(dim=1)


class PreferenceLoss:
    """The loss of a step is the mean over the pairs of the global batch.

    -log sigmoid(margin), margin = beta * ((policy - reference)[chosen] - (policy - reference)[rejected]).
    """

    metrics = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
    """Means over the pairs: the margin, the share of pairs in which it is above 0, and its two parts."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def inputs(self, batch: MicroBatch) -> MicroBatch:
        """What the model takes of a micro-batch."""
        return {key: value for key, value in batch.items() if key != "reference"}

    def loss(self, batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(summed loss, number of pairs int32, sums for the log) of one micro-batch.

        losses: float32 [B, S], of each token. A pair counts if both of its answers have labels.
        """
        reference = batch["reference"]  # [B, P, 2]
        sums, counts = document_sums(losses, batch, 2 * reference.shape[1])
        rewards = self.beta * (-sums.view_as(reference) - reference)
        counted = (counts.view_as(reference) > 0).all(dim=-1)
        chosen, rejected = rewards.unbind(dim=-1)
        margin = chosen - rejected

        def total(values: Tensor) -> Tensor:
            return torch.where(counted, values, 0.0).sum()

        loss_sum, num_pairs = total(softplus(-margin)), counted.sum().int()
        parts = (margin, (margin > 0).float(), chosen, rejected)
        logged = {name: total(part.detach()) for name, part in zip(self.metrics, parts, strict=True)}
        return loss_sum, num_pairs, {"loss_sum": loss_sum.detach(), "num_tokens": num_pairs.clone(), **logged}


def objective_of(config: Config, data: TrainingData, source: Source | None, directory: Path) -> PreferenceLoss | None:
    """What the run minimises; None: the mean loss of all labelled tokens (pretraining, and fine-tuning on answers).

    source: what the run starts from; ``directory`` the run's own. Raises UserError if the reference log-probabilities
    are missing, or are those of another model than ``source``.
    """
    if config.run.objective != "dpo":
        return None
    start = None if source is None or directory in source.path.parents else source.path
    for name in {name for phase in data.phases for name in phase.blend.names}:
        reference = data.sources[name].reference
        path = reference_path(data.sources[name].training.tokens.prefix)
        if reference is None:
            raise UserError(f"data.sources.{name}: no {path}; run `hymba reference` with the overrides of this run")
        # A run that goes on has its reference's hash in its checkpoint.
        if start is not None and reference.facts["checkpoint"] != checkpoint_hash(start):
            raise UserError(
                f"data.sources.{name}: {path} holds log-probabilities of {reference.facts['name']}, not of "
                f"checkpoint.load={config.checkpoint.load} ({start.name}): run `hymba reference` again"
            )
    return PreferenceLoss(config.optim.dpo_beta)


def checkpoint_hash(step_directory: Path) -> str:
    """sha256 (hex) that stands for all files of a checkpoint."""
    return file_sha256(step_directory / MANIFEST)
