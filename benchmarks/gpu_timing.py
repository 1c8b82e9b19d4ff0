"""Times of kernels on one GPU by replays of a captured graph."""

from __future__ import annotations

from collections.abc import Callable

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
