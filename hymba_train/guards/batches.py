"""Which samples and documents a micro-batch holds, and micro-batches without content."""

from __future__ import annotations

from typing import Any

import torch

from hymba_train.data.batches import MicroBatch
from hymba_train.data.dataset import TrainingData
from hymba_train.data.packs import Packs
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.train.loop import PlannedStep


def samples_of(step: PlannedStep, data_size: int, place: tuple[int, int]) -> range:
    """Global sample numbers (within the phase) of micro-batch ``place`` = (data-parallel rank, number)."""
    rank, number = place
    begin = step.first_sample + (number * data_size + rank) * step.micro_batch_size
    return range(begin, begin + step.micro_batch_size)


def name_samples(data: TrainingData, phase: int, samples: range) -> list[dict[str, Any]]:
    """For each sample: its number, source, file, window there, and first and last document (numbers in the file)."""
    named = []
    for number in samples:
        source, epoch, window = data.locate(phase, number)
        sequences = data.sequences(phase, source)
        tokens = sequences.part.tokens
        if isinstance(sequences, Packs):
            starts = [int(start) for start in sequences.pieces(window)[0]]
        else:
            begin = sequences.offset(window)
            starts = [begin, begin + sequences.seq_length]
        documents = [tokens.document_at(start) for start in starts]
        named.append(
            {
                "sample": number, "source": source, "epoch": epoch, "window": window, "file": f"{tokens.prefix}.bin",
                "first_document": min(documents), "last_document": max(documents),
            }
        )  # fmt: skip
    return named


def emptied(batch: MicroBatch) -> MicroBatch:
    """A micro-batch of the same shape without content: token 0 everywhere, no label, one document."""
    tokens = batch["tokens"]
    content = {
        "tokens": torch.zeros_like(tokens),
        "labels": torch.full_like(tokens, IGNORED_LABEL),
        "positions": torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(),
        "segment_ids": torch.zeros_like(tokens),
    }
    return {name: content.get(name, tensor) for name, tensor in batch.items()}
