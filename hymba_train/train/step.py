"""One optimizer step, and one evaluation: Megatron-Core's pipeline schedules around our loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from hymba_train.data.batches import MicroBatch
from hymba_train.ops.segments import document_ends
from hymba_train.parallel.fp8_state import Fp8State
from hymba_train.parallel.gathered import gathered_parameters
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.graph import GraphedPasses
from hymba_train.train.optimizer import adams_of

DOCUMENT_COUNT_MULTIPLE = 32
"""Document counts of micro-batches are rounded up to this with empty ones: kernels are planned per count."""


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step. ``requests``: how many ranks asked for what, summed over the ranks."""

    loss: float  # mean over the labelled tokens of the global batch, nats
    grad_norm: float  # global, before clipping
    num_labelled_tokens: int  # or whatever the objective counts: pairs
    requests: tuple[int, ...]
    # What became of the step: updated, skipped (as a guard has decided), lost (not finite, and no guard looks why),
    # rewind, stop.
    action: str = "updated"
    reason: str = ""  # why it was not an update
    event: dict[str, Any] | None = None  # for the log, if a guard has something to say
    rank_seconds: tuple[float, ...] = ()  # what each rank said about its step before
    suspect: bool = False  # the weights themselves may be what is wrong
    metrics: dict[str, float] | None = None  # of the objective, if it has some


@dataclass(frozen=True)
class Gradients:
    """Finished gradients, which wait in the buffers for :meth:`Stepper.update`: of the summed loss, not the mean.

    Equal on all ranks.
    """

    loss: float  # mean over the labelled tokens
    grad_norm: float  # of the mean's gradient; mean over the ranks, of which only a damaged replica differs
    num_labelled_tokens: int
    requests: tuple[int, ...]
    rank_seconds: tuple[float, ...]  # what each rank gave as ``seconds``
    sums: torch.Tensor  # float64, on the device: what Stepper._reduce gives
    loss_sums: list[torch.Tensor]  # of each micro-batch, on the device; empty but on one rank of the last stage
    metrics: dict[str, float] | None = None  # of the objective, means over what it counts


class Objective(Protocol):
    """What is minimised instead of the mean loss of all labelled tokens: a mean of something else, over a global batch.

    Attributes:
        metrics: names of further means for the log.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def inputs(self, batch: MicroBatch) -> MicroBatch:
        """Arguments for the model's forward pass."""

    def loss(
        self, batch: MicroBatch, losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """As :func:`sum_of_losses`: the sum, over how many int32, and for the log both again and the metrics' sums."""


@dataclass(frozen=True)
class Limits:
    """A step with more than these, or with something that is not finite, is not applied."""

    loss: float = math.inf
    grad_norm: float = math.inf


class Stepper:
    """Runs micro-batches through this rank's model chunks. ``objective`` None: every labelled token counts the same.

    ``graphed``: what the passes of training go through, if not straight to Megatron-Core's schedule.
    """

    def __init__(
        self, runtime: Runtime, chunks: list, optimizer: MegatronOptimizer, objective: Objective | None = None,
        graphed: GraphedPasses | None = None,
    ) -> None:  # fmt: skip
        self.runtime, self.chunks, self.optimizer, self.objective = runtime, chunks, optimizer, objective
        self.graphed = graphed
        self._metrics = () if objective is None else objective.metrics
        self._schedule = get_forward_backward_func(
            pp_size=runtime.pipeline_size, vp_size=len(chunks) if len(chunks) > 1 else None
        )
        # The loss is on the last stage; of its tensor-parallel ranks one speaks.
        self._has_loss = runtime.is_last_stage and runtime.tensor_rank == 0
        self._adams = adams_of(optimizer)
        self._fp8 = Fp8State.of(chunk.module for chunk in chunks)

    def train(
        self, micro_batches: list[MicroBatch], requests: tuple[int, ...] = (), seconds: float = 0.0
    ) -> StepResult:
        """One step that nobody guards: applied if loss and gradient norm are finite."""
        gradients, updated = self.step(micro_batches, requests, seconds)
        return result_of(gradients, *(() if updated else ("lost", "loss or gradient norm is not finite")))

    def step(
        self,
        micro_batches: list[MicroBatch],
        requests: tuple[int, ...] = (),
        seconds: float = 0.0,
        limits: Limits = Limits(),
    ) -> tuple[Gradients, bool]:
        """:meth:`gradients`, and :meth:`update` unless they are beyond ``limits``; whether they were applied.

        The device decides, so that it need not wait for the host: the update is sent off before the host reads loss
        and norm, and runs while the host prepares the next forward pass. Here the host waits for the backward pass, the
        only wait in a step.
        """
        sums, loss_sums = self._accumulate(micro_batches, requests, seconds)
        loss, grad_norm = self._loss_and_norm(sums)
        good = (loss <= limits.loss) & (grad_norm <= limits.grad_norm) & loss.isfinite() & grad_norm.isfinite()
        on_host = _to_host(torch.cat((sums, good.double()[None])))
        self._apply(sums, skip=(~good).float())
        values = on_host()
        updated = bool(values.pop())
        if not updated:
            for adam in self._adams:
                adam.uncount()
        return self._read(values, sums, loss_sums, len(requests)), updated

    def gradients(
        self, micro_batches: list[MicroBatch], requests: tuple[int, ...] = (), seconds: float = 0.0
    ) -> Gradients:
        """Forward and backward over ``micro_batches`` (this rank's part of the global batch); no update yet.

        Every rank calls it with as many micro-batches and ``requests``, which are summed over the ranks along with the
        loss. ``seconds``: a figure of this rank that all ranks get. May be called again instead of an update.
        """
        sums, loss_sums = self._accumulate(micro_batches, requests, seconds)
        return self._read(_to_host(sums)(), sums, loss_sums, len(requests))

    def update(self, gradients: Gradients) -> None:
        """Apply ``gradients``, the latest that were made."""
        self._apply(gradients.sums)

    def _accumulate(
        self, micro_batches: list[MicroBatch], requests: tuple[int, ...], seconds: float
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients in the buffers; returns (what all ranks know, float64 on the device; summed loss of each
        micro-batch)."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._passes(micro_batches)
        self.optimizer.prepare_grads()
        sums = self._reduce(outputs, requests, self.optimizer.get_grad_norm(), seconds)
        return sums, [output["loss_sum"] for output in outputs] if self._has_loss else []

    def _passes(self, micro_batches: list[MicroBatch]) -> list[dict[str, torch.Tensor]]:
        """Forward and backward passes, and the reduction of the gradients."""
        step = partial(forward_step, objective=self.objective)
        if self.graphed is None:
            return self._run(micro_batches, False, step)
        bases = tuple(chunk.module.rotary_base for chunk in self.chunks)
        return self.graphed(bases, micro_batches, lambda batches: self._run(batches, False, step))

    def _loss_and_norm(self, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over the labelled tokens and norm of its gradient, of what :meth:`_reduce` gave."""
        num_tokens = sums[1].clamp(min=1.0)
        return sums[0] / num_tokens, sums[2] / self.runtime.world_size / num_tokens

    @torch.no_grad()
    def _apply(self, sums: torch.Tensor, skip: torch.Tensor | None = None) -> None:
        """Update with the gradients in the buffers. Averaging over the tokens and clipping are one division, which
        the optimizer makes as it reads them. ``skip``: float32 scalar on the device; 1 leaves everything as it is."""
        grad_norm = self._loss_and_norm(sums)[1]
        # As torch.nn.utils.clip_grad_norm_ and Megatron-Core have it.
        excess = ((grad_norm + 1e-6) / self.optimizer.config.clip_grad).clamp(min=1.0)
        divisor = (sums[1].clamp(min=1.0) * excess).float()
        for adam in self._adams:
            adam.divisor, adam.skip = divisor, skip
        self.optimizer.step_with_ready_grads()

    def _read(
        self, values: list[float], sums: torch.Tensor, loss_sums: list[torch.Tensor], num_requests: int
    ) -> Gradients:
        loss, grad_norm = (float(x) for x in self._loss_and_norm(torch.tensor(values, dtype=torch.float64)))
        after_requests = 3 + num_requests
        after_ranks = after_requests + self.runtime.world_size
        means = (total / max(values[1], 1.0) for total in values[after_ranks:])
        return Gradients(
            loss, grad_norm, int(values[1]), tuple(int(n) for n in values[3:after_requests]),
            tuple(values[after_requests:after_ranks]), sums, loss_sums,
            dict(zip(self._metrics, means, strict=True)) or None,
        )  # fmt: skip

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

    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        """(sum of losses, labelled tokens) over all ranks' ``micro_batches``; no gradients, no update."""
        outputs = self.look(micro_batches)
        loss_sum, num_tokens = self._reduce(outputs, ()).tolist()
        return loss_sum, int(num_tokens)

    def look(
        self, micro_batches: list[MicroBatch], objective: Objective | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """What an objective has for the log of each micro-batch, on ranks of the last stage; no gradients, no update.
        Collective."""
        with self._evaluating():
            return self._run(self._fill_last_group(micro_batches), True, partial(forward_step, objective=objective))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode with its updated weights; nothing is left behind."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), gathered_parameters(self.chunks), self._fp8.untouched():
            yield
        for chunk in self.chunks:
            chunk.train()

    def _run(
        self, micro_batches: Sequence[MicroBatch], forward_only: bool, step: Callable
    ) -> list[dict[str, torch.Tensor]]:
        on_device = [self._on_device(batch) for batch in micro_batches]
        batch, seq = micro_batches[0]["tokens"].shape
        groups = self.runtime.groups
        config = self.chunks[0].config
        pipeline = self.runtime.pipeline_size > 1
        return self._schedule(
            forward_step_func=step,
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
        if "segment_ids" in batch:  # counted while they are on the host
            batch = {**batch, "document_ends": document_ends(batch["segment_ids"], DOCUMENT_COUNT_MULTIPLE)}
        return {k: v.to(self.runtime.device, non_blocking=True) for k, v in batch.items()}

    def _reduce(
        self, outputs: list[dict[str, torch.Tensor]], requests: tuple[int, ...], norm: Any = None, seconds: float = 0.0
    ) -> torch.Tensor:
        """Sums over all ranks in one collective, float64 [2]: losses, labelled tokens. With a ``norm``
        [3 + requests + ranks + metrics]: after those the norms (of the summed loss's gradient), the requests, each
        rank's ``seconds`` and the sums of the objective's metrics."""
        host = [0.0, 0.0]
        if norm is not None:
            each_rank = [0.0] * self.runtime.world_size
            each_rank[self.runtime.rank] = seconds
            host += [0.0 if isinstance(norm, torch.Tensor) else float(norm), *map(float, requests), *each_rank]
            host += [0.0] * len(self._metrics)
        sums = torch.tensor(host, dtype=torch.float64).to(self.runtime.device, non_blocking=True)
        if isinstance(norm, torch.Tensor):
            sums[2] = norm.squeeze()
        if self._has_loss:
            for i, name in enumerate(("loss_sum", "num_tokens")):
                sums[i] = torch.stack([output[name] for output in outputs]).double().sum()
            for i, name in enumerate(self._metrics if norm is not None else ()):
                sums[i - len(self._metrics)] = torch.stack([output[name] for output in outputs]).double().sum()
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


def _to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start to copy ``values``; the function returned waits for them, but not for what is sent off in between."""
    if not values.is_cuda:
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return wait


def result_of(gradients: Gradients, action: str = "updated", reason: str = "") -> StepResult:
    """What the loop is told about a step with these gradients."""
    g = gradients
    return StepResult(
        g.loss, g.grad_norm, g.num_labelled_tokens, g.requests, action, reason, rank_seconds=g.rank_seconds,
        metrics=g.metrics,
    )  # fmt: skip


def forward_step(
    micro_batches: Iterator[MicroBatch], chunk: Any, objective: Objective | None = None
) -> tuple[torch.Tensor, Any]:
    """Megatron-Core's forward_step_func: (output of the chunk, function of it that makes the loss)."""
    batch = next(micro_batches)
    if objective is not None:
        return chunk(**objective.inputs(batch)), partial(objective.loss, batch)
    output = chunk(**batch)
    return output, partial(sum_of_losses, batch["labels"])


def sum_of_losses(
    labels: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(summed loss, number of labelled tokens int32, both for the log) of one micro-batch.

    ``losses`` [B, S] float32, zero where ``labels`` is -100. The gradient is that of the sum; the update divides it by
    the tokens of the whole global batch, so micro-batches and ranks weigh by their tokens.
    """
    loss_sum = losses.sum()
    num_tokens = (labels != -100).sum().int()
    return loss_sum, num_tokens, {"loss_sum": loss_sum.detach(), "num_tokens": num_tokens.clone()}
