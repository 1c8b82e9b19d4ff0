"""Samples to micro-batches: the only part of ``data`` that knows torch and ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from hymba_train.data.dataset import Sample, TrainingData
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.errors import UserError

MicroBatch = dict[str, torch.Tensor]
"""Input of one forward pass by name. Of training data, int64 [B, S] on the CPU: tokens, labels and, with a document
mask, positions and segment_ids; of preference pairs also reference, float32 [B, P, 2]: Sample.reference, filled up with
zeros to the most pairs of a row."""


def micro_batches(
    data: TrainingData,
    phase_index: int,
    first_sample: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> list[MicroBatch]:
    """Micro-batches of one rank for one optimizer step.

    Micro-batch j of data-parallel rank r holds the global samples first_sample + (j * data_parallel_size + r) *
    micro_batch_size and the micro_batch_size - 1 after it.

    Args:
        first_sample: samples consumed in this phase before the step.
        global_batch_size: sequences of the step over all ranks.

    Raises UserError when global_batch_size is no multiple of micro_batch_size * data_parallel_size.
    """
    per_turn = micro_batch_size * data_parallel_size
    if global_batch_size % per_turn:
        raise UserError(
            f"global batch size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"data-parallel size {data_parallel_size}"
        )
    batches = []
    for turn in range(global_batch_size // per_turn):
        begin = first_sample + turn * per_turn + data_parallel_rank * micro_batch_size
        batches.append(stack_samples([data.sample(phase_index, n) for n in range(begin, begin + micro_batch_size)]))
    return batches


def validation_batches(
    data: TrainingData,
    domain: str,
    seq_length: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> list[MicroBatch]:
    """Micro-batches of one rank for one evaluation of one domain: always the same sequences, in the same order.

    Sequences are dealt out as in :func:`micro_batches`. Where they do not fill the last turn, rows without any label
    (all -100) are added, so that every rank has as many micro-batches of the same shape and the summed loss and the
    number of labels do not depend on the layout.
    """
    count = data.num_validation_samples(domain, seq_length)
    per_turn = micro_batch_size * data_parallel_size
    batches = []
    for turn in range(-(-count // per_turn)):
        begin = turn * per_turn + data_parallel_rank * micro_batch_size
        samples = []
        for index in range(begin, begin + micro_batch_size):
            sample = data.validation_sample(domain, seq_length, min(index, count - 1))
            if index >= count:
                sample["labels"] = np.full_like(sample["labels"], IGNORED_LABEL)
            samples.append(sample)
        batches.append(stack_samples(samples))
    return batches


def batch_hash(data: TrainingData, phase_index: int, first_sample: int, global_batch_size: int) -> str:
    """sha256 (hex) of the tokens of all samples of a step, in order: equal for every layout, for logs and tests.

    It reads every sample of the step, whatever rank they belong to.
    """
    digest = hashlib.sha256()
    for n in range(first_sample, first_sample + global_batch_size):
        digest.update(data.sample(phase_index, n)["tokens"].astype("<i8").tobytes())
    return digest.hexdigest()


def stack_samples(samples: Sequence[Sample]) -> MicroBatch:
    """Samples of one length as the rows of a micro-batch."""

    def stack(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows))

    positions = [sample["positions"] for sample in samples if sample["positions"] is not None]
    segment_ids = [sample["segment_ids"] for sample in samples if sample["segment_ids"] is not None]
    batch = {
        "tokens": stack([sample["tokens"][:-1] for sample in samples]),
        "labels": stack([sample["labels"] for sample in samples]),
    }
    if positions:
        batch |= {"positions": stack(positions), "segment_ids": stack(segment_ids)}
    if any("reference" in sample for sample in samples):
        references = [torch.from_numpy(sample["reference"]) for sample in samples]
        batch["reference"] = torch.nn.utils.rnn.pad_sequence(references, batch_first=True)
    return batch
