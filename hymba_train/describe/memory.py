"""What a rank holds of a parameter, padding included."""

from __future__ import annotations

from hymba_train.describe.parameters import TensorDescription


def held_parameters(tensor: TensorDescription, tensor_parallel: int) -> int:
    """Elements of a tensor that one tensor-parallel rank allocates: cut, padded, or whole if it is not cut.

    KV heads that do not divide over the ranks are held whole by every rank.
    """
    if tensor.axis is None:
        return tensor.num_parameters
    held = 0
    for part in tensor.slices:
        units = part.units if part.is_replicated(tensor_parallel) else part.part(tensor_parallel, 0)[2]
        held += units * part.unit_size
    return held * tensor.num_parameters // tensor.shape[tensor.axis]
