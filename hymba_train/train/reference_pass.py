"""``hymba reference``: log-probabilities of preference pairs under the model that DPO starts from, written to disk.

One forward pass over the packed pairs under any layout. What DPO needs of its frozen reference model is then a file of
four bytes a document, and a job holds one model.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hymba_train.checkpoint.load import find_source, load_checkpoint
from hymba_train.checkpoint.together import locked
from hymba_train.config import run_directory
from hymba_train.config.schema import Config
from hymba_train.data.answers import write_reference
from hymba_train.data.batches import MicroBatch, stack_samples
from hymba_train.data.build import build_training_data
from hymba_train.data.dataset import TrainingData
from hymba_train.data.packs import Packs
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.describe.dims import effective_rotary_base
from hymba_train.errors import UserError
from hymba_train.model import build_model_chunks
from hymba_train.parallel import initialize, shutdown
from hymba_train.parallel.ranks import failing_at_once
from hymba_train.plan import Plan
from hymba_train.train.dpo import checkpoint_hash, document_sums
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.step import Stepper

logger = logging.getLogger(__name__)
MICRO_BATCHES_EACH = 8  # of a pass through the pipeline, and stage


class DocumentLogProbs:
    """Objective of a forward pass: log-probability of every document of a micro-batch."""

    metrics = ()

    def inputs(self, batch: MicroBatch) -> MicroBatch:
        return batch

    def loss(self, batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        num_documents = int(batch["segment_ids"].max()) + 1
        sums, _ = document_sums(losses, batch, num_documents)
        return losses.sum(), torch.ones((), dtype=torch.int32), {"log_probs": -sums}


def reference(config: Config, plan: Plan) -> int:
    """Write PREFIX.reference of every source of pairs in the phases. Called by every rank; returns the exit code.

    Raises UserError: no checkpoint.load, one that cannot be read, data that cannot be opened.
    """
    runtime = initialize(config)
    with failing_at_once(), locked(run_directory(config)):
        source = find_source(config, None)
        if source is None or config.checkpoint.load is None:
            raise UserError("checkpoint.load: to be given: the model that DPO starts from")
        vocab_size = config.model.vocab_size
        data = build_training_data(config.data, seed=config.run.seed, vocab_size=vocab_size, references=False)
        models = build_model_chunks(config, runtime, [chunk.layers for chunk in plan.chunks])
        chunks = wrap_model(config, runtime, models)
        optimizer = build_optimizer(config, runtime, chunks)
        load_checkpoint(source, config, runtime, chunks, optimizer)
        stepper = Stepper(runtime, chunks, optimizer)
        facts = {"checkpoint": checkpoint_hash(source.path), "name": Path(config.checkpoint.load).name}
        done: set[str] = set()
        for index, phase in enumerate(config.data.phases.values()):
            for model in models:
                model.rotary_base = effective_rotary_base(config.model, phase.rope_type)
            for name in data.phases[index].blend.names:
                if name in done:
                    continue
                done.add(name)
                values = log_probs(data, index, name, stepper, phase.micro_batch_size)
                if runtime.is_logging_rank:
                    opened = data.sources[name]
                    content = {"source": opened.content_hash}
                    path = write_reference(opened.training.tokens.prefix, values, {**facts, **content})
                    logger.info("%s: log-probabilities of %d documents under %s", path, values.size, source.path)
    shutdown()
    return 0


def log_probs(data: TrainingData, phase: int, name: str, stepper: Stepper, micro_batch_size: int) -> np.ndarray:
    """Log-probability of the answers of each document of a source, float32 [documents]. Collective."""
    runtime, sequences = stepper.runtime, data.sequences(phase, name)
    assert isinstance(sequences, Packs), "the plan lets pairs be packed only"
    per_turn = micro_batch_size * runtime.data_parallel_size
    num_turns, each = -(-len(sequences) // per_turn), MICRO_BATCHES_EACH * runtime.pipeline_size
    values = torch.zeros(sequences.part.tokens.num_documents, dtype=torch.float64)
    for first_turn in range(0, num_turns, each):
        rows = [
            range(begin := turn * per_turn + runtime.data_parallel_rank * micro_batch_size, begin + micro_batch_size)
            for turn in range(first_turn, min(first_turn + each, num_turns))
        ]
        outputs = stepper.look([_micro_batch(data, phase, name, windows) for windows in rows], DocumentLogProbs())
        for windows, output in zip(rows, outputs, strict=False):  # outputs: none but on the last stage
            for window, found in zip(windows, output["log_probs"].double().cpu(), strict=True):
                if window < len(sequences):
                    first = torch.tensor(sequences.first_documents(window))
                    documents = torch.stack([first, first + 1], dim=1).flatten()
                    values[documents] = found[: documents.numel()]
    values = values.to(runtime.device)
    if runtime.tensor_rank:  # of the tensor-parallel ranks, which all know the same, one speaks
        values.zero_()
    dist.all_reduce(values)
    return values.float().cpu().numpy()


def _micro_batch(data: TrainingData, phase: int, name: str, windows: range) -> MicroBatch:
    """Packed sequences by their numbers; behind the last one, that one again without labels."""
    samples = []
    last = len(data.sequences(phase, name)) - 1
    for window in windows:
        sample = data.read(phase, name, min(window, last))
        if window > last:
            sample["labels"] = np.full_like(sample["labels"], IGNORED_LABEL)
        samples.append(sample)
    return stack_samples(samples)
