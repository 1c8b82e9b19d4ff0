"""``hymba eval``: held-out loss by domain, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.convert.load import LoadedModel
from hymba_train.data import TrainingData, build_training_data, validation_batches
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.errors import UserError

PAPER_TASKS = {
    "mmlu": 5, "arc_easy": 0, "arc_challenge": 0, "piqa": 0, "winogrande": 0, "hellaswag": 0, "squad_completion": 1,
}  # fmt: skip
"""Tasks of the paper's tables by lm-evaluation-harness's names, and their number of examples (MMLU, ARC-e, ARC-c, PIQA,
Winogrande, HellaSwag, SQuAD-C)."""


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
        if batch["segment_ids"] is not None:
            tokens, labels, mask = apart(tokens, labels, batch["segment_ids"])
        device = model.device
        logits = model(tokens.to(device), attention_mask=None if mask is None else mask.to(device)).logits
        flat = labels.flatten().to(device)
        total += F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORED_LABEL, reduction="sum").item()
        count += int((labels != IGNORED_LABEL).sum())
    return DomainLoss(total / max(count, 1), count)


def apart(tokens: Tensor, labels: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Documents of packed rows [B, S] as rows of their own, padded on the right: tokens, labels and mask [rows, S']."""
    pieces = []
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


def parse_tasks(text: str) -> dict[str, int]:
    """Tasks and their number of examples: ``paper``, or names such as ``piqa,arc_easy:25`` (the paper's number, or 0).

    >>> parse_tasks("piqa,squad_completion,arc_easy:25")
    {'piqa': 0, 'squad_completion': 1, 'arc_easy': 25}
    """
    tasks: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = entry.partition(":")
        if number and not number.isdigit():
            raise UserError(f"--tasks: {entry!r}: give a task, or task:examples")
        if name == "paper":
            tasks |= PAPER_TASKS
        else:
            tasks[name] = int(number) if number else PAPER_TASKS.get(name, 0)
    if not tasks:
        raise UserError("--tasks: give 'paper' or names of lm-evaluation-harness tasks")
    return tasks


def run_tasks(
    loaded: LoadedModel, tasks: dict[str, int], *, batch_size: int = 8, limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Task -> metric -> value, by lm-evaluation-harness's hf backend.

    Without network access give ``include_path``, a directory with task files whose data lie on the disk, or have the
    data in the Hub's cache and HF_HUB_OFFLINE=1 set. Raises UserError if the package, a task or its data is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not installed: pip install 'hymba-train[eval]'")
    try:  # its hf backend needs packages of its own, which it comes without by itself
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks: lm-evaluation-harness lacks a package ({error}): pip install 'hymba-train[eval]'"
        ) from error

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if name not in known]
    if unknown:
        raise UserError(*(f"--tasks: lm-evaluation-harness has no task {name!r}" for name in unknown))
    tokenizer = loaded.transformers_tokenizer()
    longest = loaded.model.config.max_position_embeddings
    backend = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
    results: dict[str, dict[str, float]] = {}
    for examples in sorted(set(tasks.values())):
        names = [name for name, number in tasks.items() if number == examples]
        try:
            found = simple_evaluate(
                model=backend, tasks=names, num_fewshot=examples, limit=limit, task_manager=manager, log_samples=False
            )
        except OSError as error:  # what datasets raises when the Hub cannot be reached is one, too
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"--tasks: the data of {', '.join(names)} cannot be had ({reason}); without network access give "
                "--include-path, or fill the Hub's cache and set HF_HUB_OFFLINE=1"
            ) from error
        for name in names:
            values = found.get("groups", {}).get(name) or found["results"][name]
            results[name] = {k.removesuffix(",none"): v for k, v in values.items() if isinstance(v, float)}
    return {name: results[name] for name in tasks}
