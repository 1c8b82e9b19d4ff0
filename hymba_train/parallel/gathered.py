"""Parameters that overlap_param_gather leaves to the next forward pass, gathered at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.distributed import DistributedDataParallel


@contextmanager
def gathered_parameters(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Inside, every rank holds its updated parameters: for evaluation and checkpoints.

    With overlap_param_gather they arrive only while the next forward pass runs.
    """
    hooked = [chunk for chunk in chunks if chunk.use_forward_hook]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
