"""Bytes that a GPU of each pipeline rank needs: exact for parameters and optimizer, an estimate for activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.describe import (
    LayerDescription,
    held_parameters,
    layer_activation_values,
    layer_tensors,
    model_tensors,
)
from hymba_train.plan.stages import Chunk


@dataclass(frozen=True)
class StageMemory:
    """One GPU of a pipeline rank."""

    pipeline_rank: int
    held_parameters: int  # padding included, embedding and output layer where they are
    model_bytes: int  # weights, gradients, master weights and both moments
    activation_bytes: int  # estimate, at the phase that needs most; 0 while no phase is given

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.activation_bytes


def stage_memory(
    config: Config,
    layers: list[LayerDescription],
    chunks: Sequence[Chunk],
    data_parallel: int,
    phases: Sequence[PhaseConfig],
) -> list[StageMemory]:
    """Memory of each pipeline rank, one entry a rank."""
    stages = []
    for rank in range(config.parallel.pipeline):
        own = [chunk for chunk in chunks if chunk.pipeline_rank == rank]
        parameters = _stage_parameters(config, layers, own, len(chunks))
        needs = [_activation_bytes(config, layers, own, chunks, phase, data_parallel) for phase in phases]
        model_bytes = int(parameters * _bytes_per_parameter(config, data_parallel))
        stages.append(StageMemory(rank, parameters, model_bytes, max(needs, default=0)))
    return stages


def _stage_parameters(config: Config, layers: list[LayerDescription], own: Sequence[Chunk], num_chunks: int) -> int:
    model, tp = config.model, config.parallel.tensor
    held = sum(
        held_parameters(tensor, tp)
        for chunk in own
        for index in chunk.layers
        for tensor in layer_tensors(model, layers[index])
    )
    ends = {t.name: held_parameters(t, tp) for t in model_tensors(model) if not t.name.startswith("decoder.layers.")}
    is_first = any(chunk.index == 0 for chunk in own)
    is_last = any(chunk.index == num_chunks - 1 for chunk in own)
    words = ends["embedding.word_embeddings.weight"]
    if is_first:
        held += words + ends.get("embedding.meta_tokens", 0)
    if is_last:
        held += ends["final_norm.weight"] + ends.get("output_layer.weight", 0)
        if "output_layer.weight" not in ends and not is_first:
            held += words  # the last rank's copy of a tied embedding
    return held


def _bytes_per_parameter(config: Config, data_parallel: int) -> float:
    """Weights and gradients on every rank; float32 master weights and two moments, shared if the optimizer is."""
    bf16 = config.precision.params == "bf16"
    gradient = 4 if config.precision.grad_reduce_in_fp32 or not bf16 else 2
    optimizer = 12 if bf16 else 8  # float32 weights are their own master
    share = data_parallel if config.parallel.distributed_optimizer else 1
    return (2 if bf16 else 4) + gradient + optimizer / share


def _activation_bytes(
    config: Config,
    layers: list[LayerDescription],
    own: Sequence[Chunk],
    chunks: Sequence[Chunk],
    phase: PhaseConfig,
    data_parallel: int,
) -> int:
    p, model = config.parallel, config.model
    rows = model.num_meta_tokens + phase.micro_batch_size * phase.seq_length
    size = 2 if config.precision.params == "bf16" else 4

    def layer_values(index: int) -> float:
        return layer_activation_values(model, layers[index], p.tensor, p.sequence)

    if p.recompute == "full":  # every layer keeps its input; one at a time is recomputed
        stream = model.hidden_size / (p.tensor if p.sequence else 1)
        per_chunk = [len(chunk.layers) * stream for chunk in own]
        extra = max(layer_values(index) for chunk in own for index in chunk.layers)
    else:
        per_chunk = [sum(layer_values(index) for index in chunk.layers) for chunk in own]
        extra = 0.0
    num_micro_batches = phase.global_batch_size // (phase.micro_batch_size * data_parallel)
    in_flight = _chunks_in_flight(p.pipeline, p.virtual_pipeline, own[0].pipeline_rank)
    in_flight = min(in_flight, num_micro_batches * p.virtual_pipeline)
    values = in_flight * sum(per_chunk) / len(per_chunk) + extra
    logits = 0
    if own[-1].index == len(chunks) - 1:
        text_rows = phase.micro_batch_size * phase.seq_length
        logits = text_rows * model.vocab_size // p.tensor * 4  # float32, once
    return int(rows * values * size) + logits


def _chunks_in_flight(pipeline: int, virtual_pipeline: int, rank: int) -> int:
    """Forward passes of single chunks that wait for their backward pass, at the worst moment (1F1B, interleaved)."""
    if virtual_pipeline == 1:
        return pipeline - rank
    return 2 * (pipeline - rank - 1) + (virtual_pipeline - 1) * pipeline + 1
