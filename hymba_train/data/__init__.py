"""Tokenised data as samples addressed by (phase, global sample number).

``build_training_data`` opens and checks the sources; ``micro_batches`` and ``validation_batches`` make tensors of
them. Only the latter need torch, so they are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from hymba_train.data.build import build_training_data, resolve_path
from hymba_train.data.dataset import Phase, Sample, Source, TrainingData
from hymba_train.data.identity import DataRecord
from hymba_train.data.prefetch import Prefetcher
from hymba_train.data.tokenizer import Tokenizer

_NEED_TORCH = ("MicroBatch", "batch_hash", "micro_batches", "validation_batches")

__all__ = [
    "DataRecord",
    "Phase",
    "Prefetcher",
    "Sample",
    "Source",
    "Tokenizer",
    "TrainingData",
    "build_training_data",
    "resolve_path",
    *_NEED_TORCH,
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(importlib.import_module("hymba_train.data.batches"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
