"""Bytes that a GPU of each pipeline rank needs, by part: exact for parameters, gradients and optimizer; activations are
the saved tensors that :mod:`hymba_train.describe.activations` lists.

Not counted: what CUDA, NCCL and cuBLAS take for themselves, temporaries of a single kernel, fragments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.describe import (
    LayerDescription,
    ModelDims,
    TensorDescription,
    end_tensors,
    held_parameters,
    layer_tensors,
)
from hymba_train.describe.activations import (
    head_saved_tensors,
    layer_saved_tensors,
    logit_gradient_bytes,
    recomputed_saved_tensors,
)
from hymba_train.describe.backends import backends_of
from hymba_train.describe.saved import SavedTensor, Setting
from hymba_train.plan.precision import PRODUCTS
from hymba_train.plan.stages import Chunk


@dataclass(frozen=True)
class StageMemory:
    """One GPU of a pipeline rank. Activations, logits and buffers are those of the phase that needs most; 0 while no
    phase is given."""

    pipeline_rank: int
    held_parameters: int  # padding included, embedding and output layer where they are
    weight_bytes: int  # with precision.fp8 also their FP8 copies, one for each direction of a product
    gradient_bytes: int
    optimizer_bytes: int  # float32 master weights and both moments
    activation_bytes: int  # with parallel.recompute as configured, output layer included
    activation_bytes_by_recompute: dict[str, int]  # the same for every choice of parallel.recompute
    logit_bytes: int  # float32 logits, and their gradient in the type of the activations
    buffer_bytes: int  # RoPE tables, messages between stages

    @property
    def model_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.activation_bytes + self.logit_bytes + self.buffer_bytes


def stage_memory(
    config: Config,
    layers: list[LayerDescription],
    chunks: Sequence[Chunk],
    data_parallel: int,
    phases: Sequence[PhaseConfig],
    message_width: int = 0,
) -> list[StageMemory]:
    """Memory of each pipeline rank, one entry a rank. ``message_width``: values a row between stages, 0 for one."""
    stages = []
    for rank in range(config.parallel.pipeline):
        stage = _Stage(config, layers, chunks, data_parallel, rank)
        tensors = list(stage.tensors())
        per_phase = [stage.activations(phase, message_width) for phase in phases]
        choice = config.parallel.recompute
        worst = max(per_phase, key=lambda need: need[0][choice] + sum(need[1:]), default=({choice: 0}, 0, 0))
        weights, gradients, optimizer = stage.model_bytes(tensors)
        stages.append(
            StageMemory(rank, sum(held for _, held in tensors), weights, gradients, optimizer, worst[0][choice], *worst)
        )
    return stages


def setting_of(config: Config, phase: PhaseConfig) -> Setting:
    """What saved tensors depend on, for a run's micro-batch. A device of ``auto`` is planned as a GPU."""
    p, precision = config.parallel, config.precision
    device = "cpu" if config.run.device == "cpu" else "cuda"
    return Setting(
        phase.micro_batch_size, phase.seq_length, p.tensor, p.sequence,
        value_bytes=2 if precision.params == "bf16" else 4, fp8=precision.fp8 is not None,
        documents=config.data.document_mask, device=device,
        backends=backends_of(config, device),
    )  # fmt: skip


class _Stage:
    """One pipeline rank."""

    def __init__(
        self, config: Config, layers: Sequence[LayerDescription], chunks: Sequence[Chunk], data_parallel: int, rank: int
    ) -> None:
        self.config, self.layers, self.data_parallel, self.rank = config, layers, data_parallel, rank
        self.own = [chunk for chunk in chunks if chunk.pipeline_rank == rank]
        self.kinds = Counter(layers[index].kind for chunk in self.own for index in chunk.layers)
        self.is_first = any(chunk.index == 0 for chunk in self.own)
        self.is_last = any(chunk.index == len(chunks) - 1 for chunk in self.own)

    def tensors(self) -> Iterator[tuple[TensorDescription, int]]:
        """(description, values held here) of every parameter."""
        model, tp = self.config.model, self.config.parallel.tensor
        for kind, count in self.kinds.items():
            for tensor in layer_tensors(model, kind):
                yield tensor, count * held_parameters(tensor, tp)
        before, after = end_tensors(model)
        if self.is_first:
            yield from ((tensor, held_parameters(tensor, tp)) for tensor in before)
        if self.is_last:
            yield from ((tensor, held_parameters(tensor, tp)) for tensor in after)
            if not model.untie_embeddings_and_output_weights and not self.is_first:
                yield before[0], held_parameters(before[0], tp)  # a copy of the tied embedding

    def model_bytes(self, tensors: list[tuple[TensorDescription, int]]) -> tuple[int, int, int]:
        """Weights and gradients on every rank; the optimizer's part shared where it is distributed."""
        precision, weights, gradients, optimizer = self.config.precision, 0, 0, 0
        for tensor, held in tensors:
            is_float32 = precision.params != "bf16" or tensor.float32
            weights += held * (4 if is_float32 else 2)
            if precision.fp8 and tensor.name in PRODUCTS:
                weights += held * 2
            gradients += held * (4 if is_float32 or precision.grad_reduce_in_fp32 else 2)
            optimizer += held * (8 if is_float32 else 12)  # float32 weights are their own master
        share = self.data_parallel if self.config.parallel.distributed_optimizer else 1
        return weights, gradients, optimizer // share

    def activations(self, phase: PhaseConfig, message_width: int) -> tuple[dict[str, int], int, int]:
        """(activations by choice of recompute, logits, buffers) while a phase is trained."""
        p, model = self.config.parallel, self.config.model
        setting = setting_of(self.config, phase)
        rows = model.num_meta_tokens + phase.micro_batch_size * phase.seq_length
        in_flight = _chunks_in_flight(p.pipeline, p.virtual_pipeline, self.rank)
        num_micro_batches = phase.global_batch_size // (phase.micro_batch_size * self.data_parallel)
        in_flight = min(in_flight, num_micro_batches * p.virtual_pipeline)
        saved = {kind: _bytes(layer_saved_tensors(model, kind, setting)) for kind in self.kinds}
        left = {kind: _bytes(recomputed_saved_tensors(model, kind, setting)) for kind in self.kinds}

        def mean_of_chunks(per_kind: dict[LayerDescription, float]) -> float:
            return sum(count * per_kind[kind] for kind, count in self.kinds.items()) / len(self.own)

        per_row = {
            "none": in_flight * mean_of_chunks(saved),
            "full": in_flight * mean_of_chunks(left) + max(saved.values()),  # one layer at a time is recomputed
        }
        logits = 0.0
        if self.is_last:
            head = head_saved_tensors(model, setting)
            logits = _bytes([t for t in head if t.name == "logits"]) + logit_gradient_bytes(model, setting)
            rest = _bytes([t for t in head if t.name != "logits"])
            per_row = {choice: value + rest for choice, value in per_row.items()}
        stream = rows / (p.tensor if p.sequence else 1)
        messages = in_flight * stream * message_width * setting.value_bytes if p.pipeline > 1 else 0
        tables = in_flight * rows * ModelDims.of(model).head_dim * 4
        return {k: int(v * rows) for k, v in per_row.items()}, int(logits * rows), int(messages + tables)


def _bytes(tensors: list[SavedTensor]) -> float:
    return sum(tensor.bytes_per_row for tensor in tensors)


def _chunks_in_flight(pipeline: int, virtual_pipeline: int, rank: int) -> int:
    """Forward passes of single chunks that wait for their backward pass, at the worst moment (1F1B, interleaved)."""
    if virtual_pipeline == 1:
        return pipeline - rank
    return 2 * (pipeline - rank - 1) + (virtual_pipeline - 1) * pipeline + 1
