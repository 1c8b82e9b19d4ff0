"""``hymba analyze kv``: how alike keys and values are across heads and layers.

That is the redundancy which grouped queries and cross-layer sharing live on. Layers that use another's keys have none
of their own and are not looked at: to judge sharing, analyse a model that was trained without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_train.analyze import common, pictures
from hymba_train.analyze.record import AttentionInputs, recording
from hymba_train.analyze.similarity import linear_cka, mean_cosine, pairwise
from hymba_train.analyze.texts import read_texts
from hymba_train.convert.cli import add_model_arguments, load_from
from hymba_train.errors import UserError

KINDS = ("keys", "values")

Features = dict[int, dict[str, Tensor]]
"""Layer -> "keys" or "values" -> [P, G, d], of text tokens; keys before RoPE, on the CPU in float32."""


@torch.inference_mode()
def collect(model: Any, texts: dict[str, list[Tensor]], max_tokens: int) -> Features:
    """Features of at most ``max_tokens`` text tokens, as many from each domain. Raises UserError without attention."""
    parts: dict[int, dict[str, list[Tensor]]] = {}
    share = max(1, max_tokens // len(texts))

    def on_attention(x: AttentionInputs) -> None:
        if x.computes_keys:
            layer = parts.setdefault(x.layer, {kind: [] for kind in KINDS})
            for kind, tensor in (("keys", x.plain_keys), ("values", x.values)):
                layer[kind].append(tensor[:, x.num_meta :].transpose(0, 1).float().cpu())

    with recording(model, on_attention):
        for sequences in texts.values():
            left = share
            for sequence in sequences:
                if left > 0:
                    model(sequence[None, :left].to(model.device), use_cache=False, logits_to_keep=1)
                    left -= len(sequence)
    if not parts:
        raise UserError("kv: this model has no attention, so no keys and values")
    return {layer: {kind: torch.cat(found[kind]) for kind in KINDS} for layer, found in sorted(parts.items())}


def analyse(features: Features) -> dict[str, Any]:
    """Matrices between heads of each layer, and between layers, for keys and for values."""
    layers, results = list(features), {}
    for kind in KINDS:
        by_layer = {layer: features[layer][kind] for layer in layers}
        heads = {}
        for layer, x in by_layer.items():
            parts = list(x.unbind(1))
            heads[layer] = {"cka": pairwise(parts, linear_cka), "cosine": pairwise(parts, mean_cosine)}
        whole = [x.flatten(1) for x in by_layer.values()]
        between = pairwise(whole, linear_cka)
        following = []
        for i in range(len(layers) - 1):
            here, there = by_layer[layers[i]], by_layer[layers[i + 1]]
            same_head = [mean_cosine(a, b) for a, b in zip(here.unbind(1), there.unbind(1), strict=True)]
            following.append(
                {"layers": [layers[i], layers[i + 1]], "cka": float(between[i, i + 1]),
                 "cosine": sum(same_head) / len(same_head)}
            )  # fmt: skip
        results[kind] = {
            "heads": {layer: {**found, **_off_diagonal(found)} for layer, found in heads.items()},
            "layers_cka": between,
            "neighbours": following,
        }
    return {"layers": layers, **results}


def _off_diagonal(found: dict[str, Tensor]) -> dict[str, float | None]:
    """Means over pairs of different heads; None with a single head."""
    number = len(found["cka"])
    if number < 2:
        return {"mean_cka": None, "mean_cosine": None}
    return {f"mean_{name}": float((m.sum() - m.trace()) / (number * (number - 1))) for name, m in found.items()}


def main(argv: Sequence[str]) -> int:
    """``hymba analyze kv``; returns the exit code. Raises UserError."""
    parser = common.make_parser("kv", "how alike keys and values are across heads and layers")
    add_model_arguments(parser)
    common.add_text_arguments(parser, sequences=8, length=512)
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens of all domains together (default 2048)")
    args = parser.parse_args(argv)
    common.require_positive(args, "sequences", "length", "max_tokens")
    common.make_directory(args.output)
    loaded = load_from(args)
    texts = read_texts(loaded, args)
    features = collect(loaded.model, texts, args.max_tokens)
    results = analyse(features)
    config = loaded.model.config
    left_out = {
        layer: "takes the keys and values of layer " + str(config.kv_source(layer))
        if config.layer_type[layer] != "m" else "has no attention"
        for layer in range(config.num_hidden_layers) if layer not in features
    }  # fmt: skip
    settings = {"model": args.model, "num_tokens": len(next(iter(features.values()))["keys"]), "domains": list(texts)}
    common.write_json(args.output, "kv", settings, {**results, "left_out": left_out})
    _print(results, left_out)
    draw(results, args.output / "kv_heads.png", args.output / "kv_layers.png")
    common.print_files(args.output, ["kv.json", "kv_heads.png", "kv_layers.png"])
    return 0


def _print(results: dict[str, Any], left_out: dict[int, str]) -> None:
    layers = results["layers"]
    for kind in KINDS:
        rows = []
        for number, layer in enumerate(layers):
            heads, following = results[kind]["heads"][layer], results[kind]["neighbours"]
            row = [str(layer), _cell(heads["mean_cka"]), _cell(heads["mean_cosine"])]
            last = number == len(layers) - 1
            rows.append([*row, *("-" if last else _cell(following[number][key]) for key in ("cka", "cosine"))])
        columns = ["layer", "heads: CKA", "heads: cosine", "next layer: CKA", "next layer: cosine"]
        common.print_table(columns, rows, f"{kind}: between KV heads of a layer, and with the next layer that has any")
    for layer, reason in left_out.items():
        print(f"left out: layer {layer}: {reason}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(results: dict[str, Any], heads_path: Path, layers_path: Path) -> None:
    """Similarity between the KV heads of each layer, and between layers."""
    plt, layers = pictures.pyplot(), results["layers"]
    columns = min(len(layers), 6)
    lines = -(-len(layers) // columns)
    figure, axes = pictures.grid(plt, 2 * lines, columns, width=2.3, height=2.1)
    for number, kind in enumerate(KINDS):
        for place, ax in enumerate(axes[number * lines : (number + 1) * lines].flat):
            if place >= len(layers):
                ax.axis("off")
                continue
            matrix = results[kind]["heads"][layers[place]]["cka"]
            pictures.heat_map(ax, matrix, title=f"{kind}, layer {layers[place]}", low=0, high=1)
    figure.suptitle("CKA between the KV heads of a layer", fontsize=10)
    pictures.save(figure, heads_path)
    figure, axes = pictures.grid(plt, 1, 2, width=4.2, height=3.8)
    for ax, kind in zip(axes[0], KINDS, strict=True):
        pictures.heat_map(ax, results[kind]["layers_cka"], title=f"CKA between layers: {kind}", low=0, high=1)
        ax.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    pictures.save(figure, layers_path)
