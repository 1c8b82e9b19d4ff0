"""What a Hymba model *is*: layers, sizes, parameters, cuts, FLOPs, bytes. Plain Python, no torch.

``plan``, ``model``, ``checkpoint``, ``convert`` and the MFU meter all read these descriptions; none keeps a copy.
"""

from hymba_train.describe.cache import ACCOUNTINGS, CacheBytes, cache_bytes
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.flops import flops_per_token, head_flops, layer_flops, training_flops, visible_keys
from hymba_train.describe.parameters import (
    Slice,
    TensorDescription,
    capacity,
    held_parameters,
    kv_is_replicated,
    partition,
)
from hymba_train.describe.published import export_obstacles
from hymba_train.describe.stack import LayerDescription, kv_crossing, resolve_stack, used_mixers
from hymba_train.describe.tensors import end_tensors, layer_tensors, model_tensors

__all__ = [
    "ACCOUNTINGS",
    "CacheBytes",
    "LayerDescription",
    "ModelDims",
    "Slice",
    "TensorDescription",
    "cache_bytes",
    "capacity",
    "end_tensors",
    "export_obstacles",
    "flops_per_token",
    "head_flops",
    "held_parameters",
    "kv_crossing",
    "kv_is_replicated",
    "layer_flops",
    "layer_tensors",
    "model_tensors",
    "partition",
    "resolve_stack",
    "training_flops",
    "used_mixers",
    "visible_keys",
]
