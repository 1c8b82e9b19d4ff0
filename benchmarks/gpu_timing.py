"""What the benchmarks of kernels on one GPU have in common: times, and other settings for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

GRAPH_WARM_UPS = 3


def milliseconds(function: Callable[[], object]) -> tuple[float, bool]:
    """(median of graph replays with a cold L2, True); without a graph, where it cannot be captured, (..., False)."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except Exception as error:
        print(f"  no graph: {type(error).__name__} {str(error)[:120]}", flush=True)
        torch.cuda.synchronize()
        return do_bench(function, warmup=5, rep=40, return_mode="median"), False
    found = do_bench(graph.replay, warmup=5, rep=40, return_mode="median")
    del graph
    return found, True


def profiled_kernels(run: Callable[[], object]) -> list[Any]:
    """Averages by torch of each kernel in ``run``: ``key``, ``count``, ``device_time_total`` in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return [e for e in profiled.key_averages() if e.device_time_total > 0]


@contextlib.contextmanager
def settings(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """Constants of a module that have other values for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
