"""Numerics with interchangeable kernels behind one signature each. Torch only, free of Megatron-Core.

``attention``, ``selective_scan`` and ``causal_conv`` are the modules of the plain-torch backends, whose functions carry
the signature (and its documentation) that every other backend shares. :func:`select` chooses a backend.
"""

from hymba_train.ops.registry import BACKENDS, Backend, Choice, select
from hymba_train.ops.rms_norm import rms_norm
from hymba_train.ops.rope import apply_rope, rope_tables

__all__ = ["BACKENDS", "Backend", "Choice", "apply_rope", "rms_norm", "rope_tables", "select"]
