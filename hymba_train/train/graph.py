"""The forward and backward passes of a step as one CUDA graph (run.cuda_graph): the host sends them off in one call.

A graph repeats what the host did while it was recorded: the same kernels on the same addresses. So micro-batches are
copied to where the recorded ones lay, results are copied away before the next replay overwrites them, and whatever
else changes the kernels (shapes, number of micro-batches, RoPE's base) is a key: another key, another graph. Gradient
buffers, weights and FP8's scales stay where they are for as long as a run lives. Zeroing gradients, norm, update,
evaluation and checkpoints are no part of it.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hymba_train.data.batches import MicroBatch
from hymba_train.errors import UserError
from hymba_train.parallel.ranks import alike

logger = logging.getLogger(__name__)
EAGER_STEPS = 3
"""Steps of a key before it is recorded: they compile kernels, build cuDNN's plans, start NCCL, make caches and
optimizer state, none of which can be done in a recording, or should lie in a graph's memory."""

Outputs = list[dict[str, torch.Tensor]]  # scalars of each micro-batch
Stacked = dict[str, torch.Tensor]  # [micro-batches] each
Run = Callable[[Sequence[MicroBatch]], Outputs]


@dataclass(frozen=True)
class Recording:
    """``outputs``: where every replay writes what the recorded function returned; ``num_bytes``: device memory for
    intermediate results, which ``graph`` keeps."""

    graph: Any  # torch.cuda.CUDAGraph
    outputs: Stacked
    num_bytes: int


def work_on_own_stream(device: torch.device) -> None:
    """Make a new stream the current one of this thread, for good: call it before the model is built.

    The default stream cannot be recorded, and autograd accumulates gradients on the stream that was current when
    Megatron-Core hung its hooks on the parameters. Raises UserError if the device is no GPU.
    """
    if device.type != "cuda":
        raise UserError(f"run.cuda_graph=true, but this process runs on {device.type}: set run.cuda_graph=false")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)


def record(body: Callable[[], Stacked]) -> Recording:
    """Record what ``body`` sends to the current stream and to those that wait for it; nothing is executed yet."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # torch.cuda.graph waits for the device and empties the cache, but leaves cycles alone
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    collects = gc.isenabled()  # not in a training, which collects at steps of its own
    gc.disable()  # what it frees might be memory or events of other streams
    try:
        # Other threads may go on with what a recording must not do: NCCL's watchdog asks for events, the feed pins
        # memory, and autograd's thread allocates.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = body()
    finally:
        if collects:
            gc.enable()
    num_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    return Recording(graph, outputs, num_bytes)


class GraphedPasses:
    """Runs a step's passes: EAGER_STEPS times as they are, then recorded, and from then on replayed.

    Args:
        device: where micro-batches go.
        keep: tensors that the passes write or read and that others may let go of while the graph lives.
        record: :func:`record`, or a stand-in.
    """

    def __init__(
        self,
        device: torch.device,
        keep: Callable[[], list[torch.Tensor]] = list,
        record: Callable[[Callable[[], Stacked]], Recording] = record,
    ) -> None:
        self.device, self._keep, self._record = device, keep, record
        self._key: Hashable = None
        self._recording: Recording | None
        self._forget()

    @property
    def num_bytes(self) -> int:
        """Memory for intermediate results that the graph holds, and torch does not count as allocated."""
        return self._recording.num_bytes if self._recording else 0

    def __call__(self, settings: Hashable, batches: Sequence[MicroBatch], run: Run) -> Outputs:
        """``run(batches)``. ``settings``: whatever changes its kernels, but for the shapes of ``batches``.

        What it returns is the caller's. ``run`` must be the same function in all calls. Raises UserError if it cannot
        be recorded.
        """
        key = settings, tuple(tuple((name, x.shape, x.dtype) for name, x in batch.items()) for batch in batches)
        if key != self._key:
            self.drop()
            self._key = key
        if self._num_eager < EAGER_STEPS:
            self._num_eager += 1
            return run(batches)
        if self._recording is None:
            self._recording = self._recorded(batches, run)
        for place, batch in zip(self._inputs, batches, strict=True):
            for name, tensor in place.items():
                tensor.copy_(batch[name], non_blocking=True)
        self._recording.graph.replay()
        outputs = {name: stacked.clone().unbind() for name, stacked in self._recording.outputs.items()}
        return [dict(zip(outputs, values, strict=True)) for values in zip(*outputs.values(), strict=True)]

    def drop(self) -> None:
        """Give the graph's memory back; the next step is an ordinary one. Also before NCCL's groups are destroyed."""
        graph = None if self._recording is None else self._recording.graph
        self._key = None
        self._forget()
        if graph is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # it may be running
        graph.reset()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU

    def _forget(self) -> None:
        self._num_eager = 0
        self._recording = None
        self._inputs: list[MicroBatch] = []
        self._kept: list[torch.Tensor] = []

    def _recorded(self, batches: Sequence[MicroBatch], run: Run) -> Recording:
        self._inputs = [
            {name: torch.empty_like(x, device=self.device) for name, x in batch.items()} for batch in batches
        ]

        def body() -> Stacked:
            outputs = run(self._inputs)
            return {name: torch.stack([output[name] for output in outputs]) for name in outputs[0]}

        def work() -> Recording:
            try:
                return self._record(body)
            except Exception as error:
                logger.exception("the passes of a step cannot be recorded")
                raise UserError(
                    f"run.cuda_graph=true, but the passes of a step cannot be recorded as a CUDA graph ({error}); "
                    "set run.cuda_graph=false"
                ) from error

        begun, self._kept = time.perf_counter(), self._keep()
        recording = alike(work)
        self._kept += self._keep()
        if dist.get_rank() == 0:
            seconds, gib = time.perf_counter() - begun, recording.num_bytes / 2**30
            logger.info("recorded the passes of a step as a CUDA graph: %.1f s, %.1f GiB", seconds, gib)
        return recording
