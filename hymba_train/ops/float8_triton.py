"""How a Triton kernel casts to FP8 with delayed scaling; :mod:`hymba_train.ops.float8` has the tensors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_scale(magnitudes, SCALE, AMAX, SCALE_INV):
    """What to multiply by before the cast; the largest of the magnitudes, a block of any shape, is noted in AMAX."""
    largest = tl.max(magnitudes)
    tl.atomic_max(AMAX, largest, mask=largest > tl.load(AMAX), sem="relaxed")  # most programs have nothing to say
    scale = tl.load(SCALE)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(SCALE_INV, tl.div_rn(1.0, scale))
    return scale
