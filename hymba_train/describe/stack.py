"""The stack as a list of named layers (design contract 2), resolved once from the recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.mixers import MIXERS, Mixer


@dataclass(frozen=True)
class LayerDescription:
    """One layer: what mixes tokens in it, what its attention sees, where its keys and values come from.

    ``kv_role`` is ``own`` (computes K/V for itself), ``producer`` (for itself and ``kv_consumers``), ``consumer``
    (takes those of layer ``kv_source``) or ``none`` (no attention). ``window`` is None in a global layer, else W:
    query i sees key j if j <= i and (i - j <= W or j is a meta token).
    """

    index: int  # 0-based, over all pipeline stages
    mixer: str  # one of hymba_train.describe.mixers
    has_ffn: bool
    window: int | None
    kv_role: str
    kv_source: int | None = None
    kv_consumers: tuple[int, ...] = ()

    @property
    def has_attention(self) -> bool:
        return MIXERS[self.mixer].has_attention

    @property
    def has_ssm(self) -> bool:
        """A Mamba-1 branch; a mamba2 layer is something of its own."""
        return MIXERS[self.mixer].has_ssm

    @property
    def kind(self) -> LayerDescription:
        """What layers have in common that hold and compute alike: this one without its place in the stack."""
        return replace(self, index=0, kv_source=None, kv_consumers=())

    @property
    def span(self) -> str:
        return "-" if not self.has_attention else "global" if self.window is None else "local"


def resolve_stack(model: ModelConfig) -> list[LayerDescription]:
    """Layer list of a model.

    Raises ValueError with one line that names the key for a pattern, global layer or KV group that cannot be.
    """
    blocks = [_parse_block(entry) for entry in model.layer_pattern]
    if not blocks:
        raise ValueError("model.layer_pattern is empty: give at least one mixer, e.g. [hybrid]")
    for index in model.global_layers:
        if not 0 <= index < model.num_layers:
            raise ValueError(f"model.global_layers: {index} is not a layer; layers are 0..{model.num_layers - 1}")
    source = _kv_sources(model)
    consumers: dict[int, tuple[int, ...]] = {}
    for index, producer in source.items():
        consumers[producer] = (*consumers.get(producer, ()), index)
    layers = []
    for index in range(model.num_layers):
        mixer, has_ffn = blocks[index % len(blocks)]
        is_global = model.window_size is None or index in model.global_layers
        if not MIXERS[mixer].has_attention:
            role = "none"
        elif index in source:
            role = "consumer"
        else:
            role = "producer" if index in consumers else "own"
        layers.append(
            LayerDescription(
                index, mixer, has_ffn, None if is_global else model.window_size, role,
                source.get(index), consumers.get(index, ()),
            )
        )  # fmt: skip
    for layer in layers:
        if not layer.has_attention and (layer.index in source or layer.index in consumers):
            raise ValueError(
                f"model.kv_groups: layer {layer.index} is an '{layer.mixer}' layer and has no keys to share; "
                "leave it out"
            )
        if layer.kv_source is not None and layers[layer.kv_source].window != layer.window:
            raise ValueError(
                f"model.kv_groups: layer {layer.index} is {layer.span} but takes the keys of layer {layer.kv_source}, "
                f"which is {layers[layer.kv_source].span}; all layers of a group must see alike: "
                f"leave layer {layer.index} out"
            )
    return layers


def used_mixers(layers: list[LayerDescription]) -> list[Mixer]:
    """The mixers of a stack, each once."""
    return [MIXERS[name] for name in dict.fromkeys(layer.mixer for layer in layers)]


def _parse_block(entry: str) -> tuple[str, bool]:
    mixer, _, option = entry.partition(":")
    if mixer not in MIXERS or option not in ("", "no_ffn"):
        raise ValueError(f"model.layer_pattern: {entry!r} is not one of {', '.join(MIXERS)}, with ':no_ffn' or without")
    return mixer, not option


def _kv_sources(model: ModelConfig) -> dict[int, int]:
    source: dict[int, int] = {}
    seen: set[int] = set()
    for group in model.kv_groups:
        if len(group) < 2 or sorted(set(group)) != list(group):
            raise ValueError(
                f"model.kv_groups: {group} must list two or more layers in rising order; write [1,2], or leave it out"
            )
        for index in group:
            if not 0 <= index < model.num_layers:
                raise ValueError(f"model.kv_groups: {index} is not a layer; layers are 0..{model.num_layers - 1}")
            if index in seen:
                raise ValueError(f"model.kv_groups: layer {index} is in two groups; leave it out of one")
            seen.add(index)
        source.update(dict.fromkeys(group[1:], group[0]))
    return source


def kv_crossing(layers: list[LayerDescription], border: int) -> tuple[int, ...]:
    """Producers whose K/V must travel when a pipeline stage starts at layer ``border``."""
    return tuple(x.index for x in layers if x.index < border and x.kv_consumers and x.kv_consumers[-1] >= border)
