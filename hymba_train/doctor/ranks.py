"""What only several processes can tell: all-reduce bandwidth and the difference between their clocks."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

from hymba_train.doctor.report import BAD, WARN, Finding, Report

SKEW_WARN_SECONDS, SKEW_BAD_SECONDS = 2.0, 60.0
REPEATS = 5
JOIN_MINUTES = 5


def is_launched() -> bool:
    """Whether torchrun (or srun with its variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def join() -> None:
    """Form the process group of all ranks."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # gloo beside nccl, for the reports
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=JOIN_MINUTES))


def leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def all_reduce(quick: bool) -> list[Finding]:
    """Bandwidth of a sum over all ranks, and its result. Every rank calls it."""
    import torch
    import torch.distributed as dist

    world_size, on_gpu = dist.get_world_size(), torch.cuda.is_available()
    size = (2**24 if quick else 2**28) if on_gpu else 2**20  # float32 values
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    values = torch.full((size,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    expected = world_size * (world_size + 1) / 2
    if not torch.all(values == expected):
        return [Finding("all-reduce", "wrong sum", BAD, f"{float(values[0])} instead of {expected}")]
    _wait(on_gpu)
    start = time.monotonic()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    _wait(on_gpu)
    seconds = torch.tensor((time.monotonic() - start) / REPEATS, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    speed = 4 * size / float(seconds)
    bus = speed * 2 * (world_size - 1) / world_size
    backend = "nccl" if on_gpu else "gloo"
    what = f"{4 * size / 2**20:.0f} MiB over {world_size} ranks, {backend}"
    return [Finding("all-reduce", f"{speed / 1e9:.2f} GB/s (bus {bus / 1e9:.2f} GB/s), {what}")]


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        import torch

        torch.cuda.synchronize()


def clocks() -> list[Finding]:
    """Largest difference between the clocks of the ranks, read right after a barrier."""
    import torch.distributed as dist

    dist.all_gather_object([None] * dist.get_world_size(), None)  # a barrier of gloo, on which nobody is early
    readings: list = [None] * dist.get_world_size()
    dist.all_gather_object(readings, (time.time(), socket.gethostname()))
    (first, slow), (last, fast) = min(readings), max(readings)
    skew = last - first
    text = f"{skew:.2f} s between ranks"
    if skew >= SKEW_WARN_SECONDS:
        level = BAD if skew >= SKEW_BAD_SECONDS else WARN
        return [Finding("clocks", text, level, f"{slow} is behind {fast}: set up NTP")]
    return [Finding("clocks", text)]


def broken_elsewhere(report: Report) -> list[Finding]:
    """What is broken on other ranks, for rank 0 to print. Every rank calls it."""
    import torch.distributed as dist

    rank, host = dist.get_rank(), socket.gethostname()
    mine = [(rank, host, f) for f in report.findings if f.level == BAD]
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    others = [item for items in everybody for item in items if item[0] != rank]
    findings = [Finding(f"rank {r} on {h}", f"{f.name}: {f.value}", BAD, f.advice) for r, h, f in others]
    return findings or [Finding("other ranks", "nothing broken")]
