"""Attention, Mamba-1, and both side by side: Hymba's own mixers (hymba-architecture 2.3 to 2.9)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.mixers.base import By, Mixer
from hymba_train.describe.parameters import Cut, Slice, TensorDescription, norm_tensor

if TYPE_CHECKING:
    from hymba_train.describe.saved import SavedTensor, Sizes
    from hymba_train.describe.stack import LayerDescription


class HymbaMixer(Mixer):
    """One branch, or both: their normed outputs are averaged, or go into out_proj side by side."""

    def __init__(self, name: str, has_attention: bool, has_ssm: bool) -> None:
        self.name, self.has_attention, self.has_ssm = name, has_attention, has_ssm
        self.branch = "hymba_train.model.ssm:SsmBranch" if has_ssm else ""

    @property
    def is_hybrid(self) -> bool:
        return self.has_attention and self.has_ssm

    def tensors(self, model: ModelConfig, layer: LayerDescription) -> list[TensorDescription]:
        """A consumer has no keys and values in in_proj."""
        d = ModelDims.of(model)
        heads = d.num_heads
        values, channels = Slice("values", heads, d.value_head_dim), Slice("channels", heads, d.head_channels)
        proj = []
        if self.has_attention:
            proj.append(Slice("q", heads, d.head_dim))
            if layer.kv_role != "consumer":
                proj += [
                    Slice("k", d.num_kv_heads, d.head_dim, kv=True),
                    Slice("v", d.num_kv_heads, d.value_head_dim, kv=True),
                ]
        if self.has_ssm:
            proj += [Slice("x", heads, d.head_channels), Slice("z", heads, d.head_channels)]
        rows = sum(s.size for s in proj)
        tensors = [
            TensorDescription(
                "mixer.in_proj.weight", (rows, d.hidden_size), "mamba.in_proj.weight", 0, tuple(proj), True
            )
        ]
        if self.has_ssm:
            e, n, r = d.inner_size, d.state_dim, d.dt_rank
            cut = Cut(axis=0, slices=(channels,))
            tensors += [
                TensorDescription("mixer.conv.weight", (e, d.conv_width), "mamba.conv1d.weight", **cut),
                TensorDescription("mixer.conv.bias", (e,), "mamba.conv1d.bias", **cut),
                TensorDescription("mixer.x_proj.weight", (r + 2 * n, e), "mamba.x_proj.0.weight", 1, (channels,), True),
                norm_tensor("mixer.dt_norm.weight", r, "mamba.dt_layernorm.weight"),
                norm_tensor("mixer.B_norm.weight", n, "mamba.B_layernorm.weight"),
                norm_tensor("mixer.C_norm.weight", n, "mamba.C_layernorm.weight"),
                TensorDescription("mixer.dt_proj.weight", (e, r), "mamba.dt_proj.0.weight", 0, (channels,), True),
                TensorDescription("mixer.dt_bias", (e,), "mamba.dt_proj.0.bias", **cut, float32=True),
                TensorDescription("mixer.A_log", (e, n), "mamba.A_log.0", **cut, float32=True),
                TensorDescription("mixer.D", (e,), "mamba.D.0", **cut, float32=True),
            ]
        if self.is_hybrid:
            for branch, piece, number in (("attention", values, 1), ("ssm", channels, 2)):
                tensors.append(
                    TensorDescription(
                        f"mixer.{branch}_norm.weight", (piece.size,), f"mamba.pre_avg_layernorm{number}.weight",
                        0, (piece,), float32=True,
                    )
                )  # fmt: skip
        out = self._out_slices(model, d)
        width = sum(s.size for s in out)
        tensors.append(
            TensorDescription("mixer.out_proj.weight", (d.hidden_size, width), "mamba.out_proj.weight", 1, out, True)
        )
        return tensors

    def _out_slices(self, model: ModelConfig, d: ModelDims) -> tuple[Slice, ...]:
        """Columns of out_proj: what the mixer puts out, by branch where both are kept apart."""
        values = Slice("values", d.num_heads, d.value_head_dim)
        channels = Slice("channels", d.num_heads, d.head_channels)
        if self.is_hybrid and model.branch_fusion == "concat":
            return values, channels
        return (channels,) if self.has_ssm else (values,)

    def scan_flops(self, model: ModelConfig) -> float:
        """Scan 7N + 10 and convolution 2 K a channel of the Mamba-1 branch."""
        if not self.has_ssm:
            return 0.0
        d = ModelDims.of(model)
        return d.inner_size * (7 * d.state_dim + 10 + 2 * d.conv_width)  # convolution: a multiply-add a tap

    def cached_values(self, model: ModelConfig) -> tuple[int, int]:
        d = ModelDims.of(model)
        return (d.inner_size * d.state_dim, d.inner_size) if self.has_ssm else (0, 0)

    def saved(self, x: Sizes, by: By) -> Iterator[SavedTensor]:
        """Branch by branch, then what joins them."""
        if self.has_attention:
            yield from by("rotate_heads")
            if x.makes_kv and not x.kv_in_projection and (x.setting.sequence or x.setting.fp8):
                # K/V are projected from rows that are gathered, or beside the FP8 form that in_proj keeps of them.
                yield x.kept("kv_proj.in", x.whole_D)
            yield from by("attention")
        if self.has_ssm:
            yield from by("causal_conv_rows")
            yield x.kept("conv.out", x.E)
            yield from by("group_rms_norm")
            yield from by("selective_scan")
        if self.is_hybrid and x.model.branch_fusion == "concat":
            yield x.kept("concat.attention", x.A)
            yield x.kept("concat.ssm", x.E)
        elif self.is_hybrid:
            yield from by("normed_average")

    def convolved(self, x: Sizes) -> Iterator[tuple[str, float, tuple[str, float]]]:
        if self.has_ssm:
            yield "conv", x.E, x.projected


MIXERS = [
    HymbaMixer("hybrid", has_attention=True, has_ssm=True),
    HymbaMixer("attention", has_attention=True, has_ssm=False),
    HymbaMixer("ssm", has_attention=False, has_ssm=True),
]
