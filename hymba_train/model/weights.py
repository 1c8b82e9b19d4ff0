"""Parameters of steps that are ops rather than modules, and the rows for those that every rank holds whole."""

from __future__ import annotations

from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor, nn

from hymba_train.model.config import HymbaConfig


class Weights(nn.Module):
    """Bare parameters, taken by calling it: with overlap_param_gather Megatron-Core waits for a parameter in the
    forward hook of the module that owns it, and what is read without a call may not have arrived."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self) -> Weights:
        return self


def rows_on_every_rank(hidden: Tensor, config: HymbaConfig, tp_group) -> Tensor:
    """hidden [N(/TP), 1, D] -> [N, D] on every tensor-parallel rank; the ranks' gradients are summed."""
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=tp_group)[:, 0]
    return copy_to_tensor_model_parallel_region(hidden, group=tp_group)[:, 0]
