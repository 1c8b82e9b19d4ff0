"""The output layer, which can hand its input and weight to a loss instead of making logits."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class OutputLayer(ColumnParallelLinear):
    """The loss is taken in here because hooks of this module (overlap_param_gather) make its weight arrive."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        *args,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None] | Tensor:
        """(logits, None); with ``loss``, loss(input_, weight)."""
        if loss is None:
            return super().forward(input_, weight, *args)
        return loss(input_, self.weight if weight is None else weight)
