"""Micro-batches of the coming steps, prepared by a thread while the current step computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hymba_train.data.batches import MicroBatch, batch_hash, micro_batches
from hymba_train.data.dataset import TrainingData
from hymba_train.data.prefetch import Prefetcher
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.loop import PlannedStep, Steps
from hymba_train.train.state import TrainState


class Feed:
    """Walks the plan ahead of the loop, from a copy of its state. Close it to stop the thread."""

    def __init__(self, data: TrainingData, steps: Steps, state: TrainState, runtime: Runtime, depth: int = 2) -> None:
        self.data, self.steps, self.runtime, self.depth = data, steps, runtime, depth
        self._prefetcher = Prefetcher(self._walk(replace(state)), depth)

    def restart(self, state: TrainState) -> None:
        """Go on from another state."""
        self.close()
        self._prefetcher = Prefetcher(self._walk(replace(state)), self.depth)

    def load(self, step: PlannedStep) -> list[MicroBatch]:
        """This rank's micro-batches of ``step``, which must be the next one of the plan."""
        prepared, batches = next(self._prefetcher)
        assert prepared == step, f"the loop is at {step}, the feed at {prepared}"
        return batches

    def hash(self, step: PlannedStep) -> str:
        """sha256 of all tokens of a step, equal under every layout."""
        return batch_hash(self.data, step.phase, step.first_sample, step.batch_size)

    def close(self) -> None:
        self._prefetcher.close()

    def _walk(self, state: TrainState) -> Iterator[tuple[PlannedStep, list[MicroBatch]]]:
        pin = self.runtime.device.type == "cuda"
        while (step := self.steps.next(state)) is not None:
            batches = micro_batches(
                self.data, step.phase, step.first_sample, global_batch_size=step.batch_size,
                micro_batch_size=step.micro_batch_size, data_parallel_rank=self.runtime.data_parallel_rank,
                data_parallel_size=self.runtime.data_parallel_size,
            )  # fmt: skip
            if pin:
                batches = [{k: v.pin_memory() for k, v in b.items()} for b in batches]
            yield step, batches
            if step.phase != state.phase:
                state.start_phase(step.phase)
            state.advance(step.batch_size, step.seq_length)
