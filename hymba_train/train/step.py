"""One optimizer step, and one evaluation: Megatron-Core's pipeline schedules around our loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from hymba_train.ops.segments import document_ends
from hymba_train.train.optimizer import gathered_parameters

MicroBatch = dict[str, torch.Tensor | None]  # tokens, labels, positions, segment_ids: int64 [B, S] or None

DOCUMENT_COUNT_MULTIPLE = 32
"""Document counts of micro-batches are rounded up to this with empty ones: kernels are planned per count."""


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step. ``requests``: how many ranks asked for what, summed over the ranks."""

    loss: float  # mean over the labelled tokens of the global batch, nats
    grad_norm: float  # global, before clipping
    num_labelled_tokens: int
    requests: tuple[int, ...]
    action: str = "updated"  # updated | skipped | rewind | stop: what became of the step (hymba_train.guards)
    reason: str = ""  # why it was not an update
    event: dict[str, Any] | None = None  # for the log, if a guard has something to say
    rank_seconds: tuple[float, ...] = ()  # what each rank said about its step before


@dataclass(frozen=True)
class Gradients:
    """Finished gradients, which wait in the buffers for :meth:`Stepper.update`. Equal on all ranks but for ``norm``."""

    loss: float
    grad_norm: float  # mean over the ranks, which only a damaged replica differs from
    num_labelled_tokens: int
    requests: tuple[int, ...]
    rank_seconds: tuple[float, ...]  # what each rank gave as ``seconds``
    norm: Any  # as Megatron-Core's clipping wants it: float, or float32 [1] on the device
    loss_sums: list[torch.Tensor]  # of each micro-batch, on the device; empty but on one rank of the last stage


class Stepper:
    """Runs micro-batches through this rank's model chunks."""

    def __init__(self, runtime, chunks: list, optimizer) -> None:
        self.runtime, self.chunks, self.optimizer = runtime, chunks, optimizer
        self._schedule = get_forward_backward_func(
            pp_size=runtime.pipeline_size, vp_size=len(chunks) if len(chunks) > 1 else None
        )
        # The loss is on the last stage; of its tensor-parallel ranks one speaks.
        self._has_loss = runtime.is_last_stage and runtime.tensor_rank == 0

    def train(
        self, micro_batches: list[MicroBatch], requests: tuple[int, ...] = (), seconds: float = 0.0
    ) -> StepResult:
        """:meth:`gradients`, then :meth:`update`: a step that nobody guards."""
        gradients = self.gradients(micro_batches, requests, seconds)
        updated = self.update(gradients)
        return result_of(gradients, *(() if updated else ("skipped", "the optimizer refused the update")))

    def gradients(
        self, micro_batches: list[MicroBatch], requests: tuple[int, ...] = (), seconds: float = 0.0
    ) -> Gradients:
        """Forward and backward over ``micro_batches`` (this rank's part of the global batch); no update yet.

        The gradient is that of the mean over all labelled tokens of the global batch, under every layout. Every rank
        calls it with as many micro-batches and ``requests``, which are summed over the ranks along with the loss.
        ``seconds``: a figure of this rank that all ranks get. May be called again instead of an update.

        Here the host waits for the device, the only time in a step. The update is sent off afterwards, so whether to
        make it can be decided in between, and runs while the host prepares the next forward pass.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(micro_batches, forward_only=False)
        self.optimizer.prepare_grads()
        norm = self.optimizer.get_grad_norm()
        sums = self._reduce(outputs, requests, norm, seconds).tolist()
        world_size, num_requests = self.runtime.world_size, len(requests)
        loss_sum, num_tokens, norm_sum = sums[0], sums[1], sums[2]
        return Gradients(
            loss_sum / max(num_tokens, 1.0), norm_sum / world_size, int(num_tokens),
            tuple(int(number) for number in sums[3 : 3 + num_requests]), tuple(sums[3 + num_requests :]), norm,
            [output["loss_sum"] for output in outputs] if self._has_loss else [],
        )  # fmt: skip

    @torch.no_grad()
    def update(self, gradients: Gradients) -> bool:
        """Clip and apply ``gradients``, the latest that were made. False if the optimizer left the weights alone."""
        parameters = self.optimizer.get_parameters()
        if parameters and self.optimizer.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, self.optimizer.config.clip_grad, gradients.norm)
        return self.optimizer.step_with_ready_grads()

    def exchange(self, requests: tuple[int, ...]) -> tuple[int, ...]:
        """``requests`` summed over the ranks, for a step that trains nothing."""
        sums = torch.tensor(requests, dtype=torch.int64).to(self.runtime.device)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def micro_batch_losses(self, gradients: Gradients) -> list[list[float]]:
        """Summed loss of every micro-batch, [data-parallel rank][micro-batch], on all ranks. Makes the host wait."""
        data_rank, data_size = self.runtime.data_parallel_rank, self.runtime.data_parallel_size
        count = torch.tensor([len(gradients.loss_sums)], device=self.runtime.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        table = torch.zeros(data_size, int(count), dtype=torch.float64, device=self.runtime.device)
        if gradients.loss_sums:
            table[data_rank] = torch.stack(gradients.loss_sums).double()
        dist.all_reduce(table)
        return table.tolist()

    @torch.no_grad()
    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        """(sum of losses, labelled tokens) over all ranks' ``micro_batches``; no gradients, no update."""
        for chunk in self.chunks:
            chunk.eval()
        with gathered_parameters(self.chunks):
            outputs = self._run(self._fill_last_group(micro_batches), forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        loss_sum, num_tokens = self._reduce(outputs, ()).tolist()
        return loss_sum, int(num_tokens)

    @torch.no_grad()
    def measure(
        self, micro_batches: list[MicroBatch], of_logits: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
        shape: tuple[int, ...],
    ) -> torch.Tensor:  # fmt: skip
        """``of_logits`` (micro-batch, logits [B, S, V]) -> float64 ``shape``, summed over all micro-batches and ranks.

        The model is given a micro-batch's tokens alone; the rest of it is for ``of_logits``. Every rank calls it with
        as many, of the same shape. No gradients, no update.
        """
        for chunk in self.chunks:
            chunk.eval()
        missing = -len(micro_batches) % self.runtime.pipeline_size if len(self.chunks) > 1 else 0
        with gathered_parameters(self.chunks):
            filled = [*micro_batches, *[micro_batches[-1]] * missing]
            outputs = self._run(filled, forward_only=True, step=partial(logits_step, of_logits))
        for chunk in self.chunks:
            chunk.train()
        sums = torch.zeros(shape, dtype=torch.float64, device=self.runtime.device)
        if self._has_loss:
            sums += torch.stack([output["sums"] for output in outputs[: len(micro_batches)]]).sum(0).to(sums.device)
        dist.all_reduce(sums)
        return sums

    def _run(
        self, micro_batches: list[MicroBatch], forward_only: bool, step: Callable | None = None
    ) -> list[dict[str, torch.Tensor]]:
        on_device = [self._on_device(batch) for batch in micro_batches]
        batch, seq = micro_batches[0]["tokens"].shape
        groups = self.runtime.groups
        config = self.chunks[0].config
        pipeline = self.runtime.pipeline_size > 1
        return self._schedule(
            forward_step_func=step or forward_step,
            data_iterator=[iter(on_device) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            # The token axis is flat: a micro-batch is one "sequence" of that many rows to the schedule.
            seq_length=self.chunks[0].module.num_token_rows(batch, seq),
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=groups,
            p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config) if pipeline else None,
        )

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        ids = batch.get("segment_ids")
        if ids is not None:  # counted while it is on the host
            batch = {**batch, "document_ends": document_ends(ids, DOCUMENT_COUNT_MULTIPLE)}
        return {k: None if v is None else v.to(self.runtime.device, non_blocking=True) for k, v in batch.items()}

    def _reduce(
        self, outputs: list[dict[str, torch.Tensor]], requests: tuple[int, ...], norm: Any = None, seconds: float = 0.0
    ) -> torch.Tensor:
        """Sums over all ranks in one collective, float64 [2]: losses, labelled tokens. With a ``norm``
        [3 + requests + ranks]: after those the norms, the requests and each rank's ``seconds``."""
        host = [0.0, 0.0]
        if norm is not None:
            each_rank = [0.0] * self.runtime.world_size
            each_rank[self.runtime.rank] = seconds
            host += [0.0 if isinstance(norm, torch.Tensor) else float(norm), *map(float, requests), *each_rank]
        sums = torch.tensor(host, dtype=torch.float64).to(self.runtime.device, non_blocking=True)
        if isinstance(norm, torch.Tensor):
            sums[2] = norm.squeeze()
        if self._has_loss:
            for i, name in enumerate(("loss_sum", "num_tokens")):
                sums[i] = torch.stack([output[name] for output in outputs]).double().sum()
        dist.all_reduce(sums)
        return sums

    def _fill_last_group(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The interleaved schedule wants a multiple of the pipeline size: add micro-batches without labels."""
        if len(self.chunks) == 1:
            return micro_batches
        missing = -len(micro_batches) % self.runtime.pipeline_size
        last = micro_batches[-1]
        empty = {**last, "labels": torch.full_like(last["labels"], -100)}
        return [*micro_batches, *[empty] * missing]


def result_of(gradients: Gradients, action: str = "updated", reason: str = "") -> StepResult:
    """What the loop is told about a step with these gradients."""
    g = gradients
    return StepResult(
        g.loss, g.grad_norm, g.num_labelled_tokens, g.requests, action, reason, rank_seconds=g.rank_seconds
    )


def forward_step(micro_batches: Iterator[MicroBatch], chunk) -> tuple[torch.Tensor, Any]:
    """Megatron-Core's forward_step_func: (output of the chunk, function of it that makes the loss)."""
    batch = next(micro_batches)
    output = chunk(**batch)
    return output, partial(sum_of_losses, batch["labels"])


def sum_of_losses(
    labels: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(summed loss, number of labelled tokens int32, both for the log) of one micro-batch.

    ``losses`` [B, S] float32, zero where ``labels`` is -100. With calculate_per_token_loss the gradient of the sum is
    divided by the tokens of the whole global batch, so micro-batches and ranks weigh by their tokens.
    """
    loss_sum = losses.sum()
    num_tokens = (labels != -100).sum().int()
    return loss_sum, num_tokens, {"loss_sum": loss_sum.detach(), "num_tokens": num_tokens.clone()}


def logits_step(
    of_logits: Callable[[MicroBatch, torch.Tensor], torch.Tensor], micro_batches: Iterator[MicroBatch], chunk
) -> tuple[torch.Tensor, Any]:
    """A forward_step_func whose "loss" is a measurement of the logits."""
    batch = next(micro_batches)

    def measured(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        nothing = logits.new_zeros(())
        return nothing, nothing.int(), {"sums": of_logits(batch, logits)}

    return chunk(batch["tokens"]), measured
