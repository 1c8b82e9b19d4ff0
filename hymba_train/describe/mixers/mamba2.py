"""Mamba-2 (arXiv 2405.21060, section 7): one decay a head; B and C belong to groups of heads.

There may be one group alone, so every rank computes all of B and C from weights that it holds whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hymba_train.config.nearest import divisors_around
from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims, inner_size_in_words
from hymba_train.describe.mixers.base import By, Mixer, SsdSizes
from hymba_train.describe.parameters import Cut, Slice, TensorDescription

if TYPE_CHECKING:
    from hymba_train.describe.saved import SavedTensor, Sizes
    from hymba_train.describe.stack import LayerDescription


@dataclass(frozen=True)
class Mamba2Dims:
    """Sizes of a mamba2 layer."""

    state_dim: int
    head_dim: int
    num_heads: int
    num_groups: int

    @property
    def bc_size(self) -> int:
        """Width of B and C together."""
        return 2 * self.num_groups * self.state_dim

    @classmethod
    def of(cls, model: ModelConfig) -> Mamba2Dims:
        heads = ModelDims.of(model).inner_size // model.mamba2_head_dim
        return cls(model.mamba2_state_dim, model.mamba2_head_dim, heads, model.mamba2_num_groups)


class Mamba2(Mixer):
    """A scan with one decay a head, between a convolution and a norm behind the gate."""

    name = "mamba2"
    branch = "hymba_train.model.mamba2:Mamba2Branch"
    in_published_format = False

    def tensors(self, model: ModelConfig, layer: LayerDescription) -> list[TensorDescription]:
        """Not in the published format: no names there."""
        d, own = ModelDims.of(model), Mamba2Dims.of(model)
        e, heads, bc = d.inner_size, own.num_heads, own.bc_size
        channels, per_head = Slice("channels", heads, own.head_dim), Slice("heads", heads)
        proj = (Slice("x", heads, own.head_dim), Slice("z", heads, own.head_dim), Slice("dt", heads))
        cut, one_a_head = Cut(axis=0, slices=(channels,)), Cut(axis=0, slices=(per_head,))
        return [
            TensorDescription("mixer.in_proj.weight", (2 * e + heads, d.hidden_size), "", 0, proj, True),
            TensorDescription("mixer.bc_proj.weight", (bc, d.hidden_size), "", weight_decay=True),
            TensorDescription("mixer.conv.weight", (e, d.conv_width), "", **cut),
            TensorDescription("mixer.conv.bias", (e,), "", **cut),
            TensorDescription("mixer.bc_conv.weight", (bc, d.conv_width), ""),
            TensorDescription("mixer.bc_conv.bias", (bc,), ""),
            TensorDescription("mixer.dt_bias", (heads,), "", **one_a_head, float32=True),
            TensorDescription("mixer.A_log", (heads,), "", **one_a_head, float32=True),
            TensorDescription("mixer.D", (heads,), "", **one_a_head, float32=True),
            TensorDescription("mixer.gated_norm.weight", (e,), "", **cut, float32=True),
            TensorDescription("mixer.out_proj.weight", (d.hidden_size, e), "", 1, (channels,), True),
        ]

    def scan_flops(self, model: ModelConfig) -> float:
        """What the recurrence takes, however much more the kernels spend on computing it as matrix products."""
        d, own = ModelDims.of(model), Mamba2Dims.of(model)
        scan = d.inner_size * (5 * own.state_dim + 10)
        return scan + (d.inner_size + own.bc_size) * 2 * d.conv_width

    def cached_values(self, model: ModelConfig) -> tuple[int, int]:
        inner, own = ModelDims.of(model).inner_size, Mamba2Dims.of(model)
        return inner * own.state_dim, inner + own.bc_size

    def saved(self, x: Sizes, by: By) -> Iterator[SavedTensor]:
        """B and C are whole on every rank."""
        if x.setting.sequence:  # gathered, to project B and C from
            yield x.kept("bc_proj.in", x.whole_D)
        yield from by("causal_conv_rows")
        yield x.kept("conv.out", x.out_width)
        yield x.kept("bc_conv.out", Mamba2Dims.of(x.model).bc_size)
        yield from by("ssd_scan")
        yield x.kept("gated_norm.y", x.out_width)
        yield x.kept(*x.projected)  # z

    def convolved(self, x: Sizes) -> Iterator[tuple[str, float, tuple[str, float]]]:
        bc = Mamba2Dims.of(x.model).bc_size
        yield "conv", x.out_width, x.projected
        yield "bc_conv", bc, ("bc_proj.out", bc)

    def ssd_sizes(self, model: ModelConfig) -> SsdSizes:
        own = Mamba2Dims.of(model)
        return SsdSizes(own.num_heads, own.head_dim, own.state_dim, "model.mamba2_head_dim", "model.mamba2_state_dim")

    def check_model(self, model: ModelConfig) -> list[str]:
        """Whole heads, in groups of equal size."""
        inner, width, groups = ModelDims.of(model).inner_size, model.mamba2_head_dim, model.mamba2_num_groups
        if inner % width:
            return [
                f"model.mamba2_head_dim={width} does not divide {inner_size_in_words(model)}: "
                f"{divisors_around(width, inner)}"
            ]
        heads = inner // width
        if heads % groups:
            return [
                f"model.mamba2_num_groups={groups} does not divide the {heads} heads of {width} channels: "
                f"{divisors_around(groups, heads)}"
            ]
        return []

    def check_layout(self, model: ModelConfig, tensor_parallel: int) -> list[str]:
        """Tensor parallelism deals whole heads, and a rank's heads must share their groups evenly."""
        own, tp = Mamba2Dims.of(model), tensor_parallel
        if own.num_heads % tp:
            return [
                f"parallel.tensor={tp} does not divide the {own.num_heads} heads of a mamba2 layer "
                f"(model.mamba2_head_dim={own.head_dim}): {divisors_around(tp, own.num_heads)}"
            ]
        if own.num_groups % tp and tp % own.num_groups:
            return [
                f"parallel.tensor={tp} and model.mamba2_num_groups={own.num_groups}: one must be a multiple of the "
                f"other; {divisors_around(tp, own.num_groups)}"
            ]
        return []


MIXERS = [Mamba2()]
