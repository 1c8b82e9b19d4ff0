"""What every mixer says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.parameters import TensorDescription

if TYPE_CHECKING:  # which know the mixers
    from hymba_train.describe.saved import SavedTensor, Sizes
    from hymba_train.describe.stack import LayerDescription

By = Callable[[str], Iterator["SavedTensor"]]
"""Op -> what its chosen backend keeps."""


@dataclass(frozen=True)
class SsdSizes:
    """What a mixer hands to hymba_train.ops.ssd_scan, all ranks together, and the keys that say so."""

    num_heads: int
    head_dim: int
    state_dim: int  # per channel
    head_dim_key: str
    state_dim_key: str


class Mixer:
    """What mixes the tokens of a layer, between ``in_proj`` and ``out_proj``.

    :mod:`hymba_train.describe` asks for shapes, work and memory, :mod:`hymba_train.plan` for problems, and the model
    for the module to build.
    """

    name: str
    """As in model.layer_pattern."""
    branch: str = ""
    """'module:class' of what stands between in_proj and out_proj, beside attention if there is that, too
    (hymba_train/model/mixer.py says how it is called); '': attention alone."""
    has_attention: bool = False
    has_ssm: bool = False
    """Whether the branch is Mamba-1."""
    in_published_format: bool = True
    """Whether the Hugging Face format of Hymba has such layers."""

    def tensors(self, model: ModelConfig, layer: LayerDescription) -> list[TensorDescription]:
        """Every parameter, names from ``mixer.`` on. ``mixer.in_proj.weight`` and ``mixer.out_proj.weight`` are among
        them; the slices of the former are what the branch is called with. What decays is a matrix product's weight."""
        raise NotImplementedError

    def scan_flops(self, model: ModelConfig) -> float:
        """Forward FLOPs a row of scan and convolutions: what is neither a weight's product nor attention."""
        return 0.0

    def cached_values(self, model: ModelConfig) -> tuple[int, int]:
        """(values of the state, inputs of the convolutions) that one sequence keeps while it is generated."""
        return 0, 0

    def saved(self, x: Sizes, by: By) -> Iterator[SavedTensor]:
        """What is kept for the backward pass between input_norm's output and out_proj's input, without these two; with
        repetitions."""
        raise NotImplementedError

    def convolved(self, x: Sizes) -> Iterator[tuple[str, float, tuple[str, float]]]:
        """(name, width on a rank, storage that the input is a view of) of every causal convolution."""
        return iter(())

    def ssd_sizes(self, model: ModelConfig) -> SsdSizes | None:
        """Sizes of its SSD scan, if it has one."""
        return None

    def check_model(self, model: ModelConfig) -> list[str]:
        """Problems of its shapes, one line each. Expects given, positive numbers."""
        return []

    def check_layout(self, model: ModelConfig, tensor_parallel: int) -> list[str]:
        """Problems of cutting it over ``tensor_parallel`` > 1 ranks. Expects a possible model."""
        return []
