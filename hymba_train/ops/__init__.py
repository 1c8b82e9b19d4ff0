"""Numerics with interchangeable kernels behind one signature each. Torch only, free of Megatron-Core.

Modules named after an op (``attention``, ``selective_scan``, ``swiglu``, ...) hold its plain-torch backend, whose
function carries the signature (and its documentation) that every other backend shares. :func:`select` chooses one.
"""

from hymba_train.ops.registry import BACKENDS, Backend, Choice, select
from hymba_train.ops.rms_norm import rms_norm
from hymba_train.ops.rope import apply_rope, rope_tables

__all__ = ["BACKENDS", "Backend", "Choice", "apply_rope", "rms_norm", "rope_tables", "select"]
