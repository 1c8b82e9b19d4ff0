"""Replicas that should be equal bit for bit, and whether they are.

Data-parallel ranks hold the same parameters; tensor-parallel ranks the same norms, biases and meta tokens. Nothing
compares them in training: after a flipped bit they drift apart for good, and a checkpoint keeps one of them. Here every
rank sums up its values on the device, two collectives compare the sums, and the host waits once a check.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer

from hymba_train.callbacks.base import Callback
from hymba_train.errors import ReplicasDiffer
from hymba_train.parallel.gathered import gathered_parameters
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.loop import Loop
from hymba_train.train.metrics import StepMetrics

CHUNK_VALUES = 2**22  # summed up at a time: 32 MiB of int64
MOST_NAMED = 5


@dataclass(frozen=True)
class Replica:
    """A tensor of which other ranks hold a copy: all data-parallel ones, and tensor-parallel ones if ``everywhere``."""

    name: str
    tensor: torch.Tensor
    everywhere: bool


class DriftGuard(Callback):
    """Compares every so many steps and before every checkpoint, so that none is written of replicas that differ.

    Args:
        models: model chunks of this rank. chunks: the same in DistributedDataParallel.
        intervals: compare after every step that is a multiple of one of them (that of checkpoints among them).
    """

    def __init__(
        self, runtime: Runtime, models: list, chunks: list, optimizer: MegatronOptimizer, intervals: list[int]
    ) -> None:  # fmt: skip
        self.runtime, self.models, self.chunks, self.optimizer = runtime, models, chunks, optimizer
        self.intervals = intervals
        self._checked_at: int | None = None

    def on_train_start(self, loop: Loop) -> None:
        self._checked_at = loop.state.step

    on_rewind = on_train_start

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        step = loop.state.step
        is_last = loop.stop_reason or loop.finished  # Checkpointing saves in this hook then
        if is_last or any(step % interval == 0 for interval in self.intervals):
            self.check(loop)

    def on_train_end(self, loop: Loop) -> None:
        if loop.state.step != self._checked_at:
            self.check(loop)

    def check(self, loop: Loop) -> None:
        """Raises ReplicasDiffer, on every rank, if replicas differ on any."""
        self._checked_at = loop.state.step
        with torch.no_grad(), gathered_parameters(self.chunks):
            replicas = list(replicas_of(self.models, self.optimizer))
            sums = torch.stack([checksum(replica.tensor) for replica in replicas])
        shared = torch.tensor([replica.everywhere for replica in replicas])
        if not self._differ(sums, shared):
            return
        problems = self._name(replicas, sums)
        more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        text = "; ".join(problems[:MOST_NAMED]) + more
        last = f"replicas differ after step {loop.state.step}: {text}"
        loop.emit("on_guard", {"guard": "drift", "step": loop.state.step, "problem": last, "action": "end the ranks"})
        raise ReplicasDiffer(last)

    def _differ(self, sums: torch.Tensor, shared: torch.Tensor) -> bool:
        groups = self.runtime.groups
        differs = torch.zeros(1, dtype=torch.int64, device=sums.device)
        for group, mine in ((groups.dp, sums), (groups.tp, sums[shared.to(sums.device)])):
            if group.size() == 1:
                continue
            most = torch.stack([mine, ~mine])  # the largest ~x belongs to the smallest x
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
            differs += (most[0] != ~most[1]).sum()
        dist.all_reduce(differs)
        return bool(differs)

    def _name(self, replicas: list[Replica], sums: torch.Tensor) -> list[str]:
        """One line for each tensor whose copies differ: on which ranks."""
        tensor_rank = self.runtime.tensor_rank
        mine = [
            (replica.name, None if replica.everywhere else tensor_rank, value)
            for replica, value in zip(replicas, sums.tolist(), strict=True)
        ]
        everyone: list[Any] = [None] * self.runtime.world_size
        dist.all_gather_object(everyone, mine)
        return differing(everyone)


def differing(everyone: list[list[tuple[str, int | None, int]]]) -> list[str]:
    """Lines about (name, part, checksum) of each rank, of which those with equal name and part should be equal."""
    holders: dict[tuple, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, entries in enumerate(everyone):
        for name, part, value in entries:
            holders[name, part][value].append(rank)
    lines = []
    for (name, _), by_value in holders.items():
        if len(by_value) == 1:
            continue
        (usual, most), *rest = Counter({value: len(ranks) for value, ranks in by_value.items()}).most_common()
        if rest[0][1] == most:
            sides = " and ".join(f"rank {_listed(ranks)}" for ranks in by_value.values())
            lines.append(f"{name}: {sides} differ, no side has a majority")
        else:
            odd = sorted(rank for value, ranks in by_value.items() if value != usual for rank in ranks)
            lines.append(f"{name}: rank {_listed(odd)} differs from rank {_listed(by_value[usual])}")
    return lines


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def replicas_of(models: list, optimizer: MegatronOptimizer) -> Iterator[Replica]:
    """Parameters, and without the distributed optimizer their masters and moments, which are replicated then, too."""
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    split = isinstance(optimizer, DistributedOptimizer)
    for model in models:
        for name, param, _, cut in model.described_parameters():
            everywhere = cut.replicated or not cut.slices
            yield Replica(name, param.detach(), everywhere)
            if split:
                continue
            master = getattr(param, "main_param", param)
            if master is not param:
                yield Replica(f"{name} (master)", master.detach(), everywhere)
            for kind, tensor in sorted(optimizer.optimizer.state[master].items()):
                if isinstance(tensor, torch.Tensor) and tensor.shape == param.shape:
                    yield Replica(f"{name} ({kind})", tensor, everywhere)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [] on the device: of the bits, so that -0.0 and NaN count. A single flipped bit always changes it: it adds
    a power of two times an odd number, modulo 2**64."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(-1).view(kinds[tensor.element_size()])
    odd = torch.arange(1, 2 * min(CHUNK_VALUES, max(bits.numel(), 1)), 2, dtype=torch.int64, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(CHUNK_VALUES):
        total = total * 1_000_003 + (chunk.to(torch.int64) * odd[: chunk.numel()]).sum()
    return total
