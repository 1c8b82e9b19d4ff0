"""Distributed pretraining of Hymba language models on Megatron-Core."""

import importlib.util
import sys
import types

__version__ = "0.1.0"

_PAGED_STASH = "megatron.core.transformer.moe.ops.paged_stash"


def _let_megatron_import_without_triton() -> None:
    """Megatron-Core 0.19 imports one module of Triton MoE kernels unconditionally (pipeline_parallel.schedules); they
    never run here. Where Triton is not installed (a CPU build of torch), an empty module stands in for it."""
    if importlib.util.find_spec("triton") is None:
        stub = types.ModuleType(_PAGED_STASH)
        stub.GLOBAL_BLOCK_SIZE = stub.paged_stash_copy_kernel = stub.paged_stash_pop_kernel = None
        sys.modules.setdefault(_PAGED_STASH, stub)


_let_megatron_import_without_triton()
