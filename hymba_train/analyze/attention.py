"""``hymba analyze attention``: where attention heads look, and where the SSM branch does by its implied attention.

The definitions are in docs/analyze.md. An SSM head is a channel; of the E channels of a layer ``--ssm-channels`` evenly
spaced ones are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hymba_train.analyze import common
from hymba_train.analyze.attention_pictures import draw
from hymba_train.analyze.head_stats import CATEGORIES, HeadStats, receptive_field, total_variation
from hymba_train.analyze.record import AttentionInputs, ScanInputs, recording, without_meta_tokens
from hymba_train.analyze.rows import attention_rows, blocks, implied_rows, normalised, spread_channels
from hymba_train.analyze.texts import read_texts
from hymba_train.convert.cli import add_model_arguments, load_from
from hymba_train.errors import UserError

BRANCHES = ("attention", "ssm")
MAP_TOKENS = 256  # of a map: the meta tokens and the first text tokens


@dataclass
class Maps:
    """Matrices [T, T] to draw: by layer, of the chosen heads, and the mean over the channels of the SSM."""

    layers: list[int]
    heads: list[int]
    attention: dict[int, Tensor] = field(default_factory=dict)  # layer -> [heads, T, T]
    ssm: dict[int, Tensor] = field(default_factory=dict)  # layer -> [T, T]


Stats = dict[str, dict[int, HeadStats]]  # branch -> layer


@torch.inference_mode()
def collect(model: Any, sequences: Sequence[Tensor], num_channels: int, maps: Maps | None = None) -> Stats:
    """Statistics of both branches over ``sequences``; ``maps`` is filled from the first of them."""
    stats: Stats = {branch: {} for branch in BRANCHES}

    def on_attention(x: AttentionInputs) -> None:
        num_tokens, num_heads, _ = x.queries.shape
        stat = stats["attention"].setdefault(x.layer, HeadStats())
        for rows in blocks(num_heads, num_tokens, x.queries.device):
            stat.add(attention_rows(x, rows), rows.start, x.num_meta)
        if first and maps is not None and x.layer in maps.layers:
            maps.attention[x.layer] = attention_rows(x, slice(0, num_tokens))[maps.heads].float().cpu()

    def on_scan(x: ScanInputs) -> None:
        num_tokens, channels = len(x.u), spread_channels(x.u.shape[1], num_channels, x.u.device)
        stat, mean = stats["ssm"].setdefault(x.layer, HeadStats()), []
        for rows in blocks(len(channels), num_tokens, x.u.device):
            alpha = normalised(implied_rows(x, rows, channels))
            stat.add(alpha, rows.start, x.num_meta)
            mean.append(alpha.mean(0).float().cpu())
        if first and maps is not None and x.layer in maps.layers:
            maps.ssm[x.layer] = torch.cat(mean)

    with recording(model, on_attention, on_scan):
        for number, sequence in enumerate(sequences):
            first = number == 0
            model(sequence[None].to(model.device), use_cache=False, logits_to_keep=1)
    return stats


def summarise(stats: dict[int, HeadStats], bare: dict[int, HeadStats] | None) -> dict[str, Any]:
    """One branch in one domain. ``bare``: the same without the model's meta tokens, or None where it has none."""
    layers = list(stats)
    distances = {name: [float(stats[i].mean(name).mean()) for i in layers] for name in ("distance", "distance_text")}
    result = {
        "layers": layers,
        "mass": {name: [stats[i].mean(name).tolist() for i in layers] for name in CATEGORIES},
        "mass_mean": {name: float(torch.stack([stats[i].mean(name) for i in layers]).mean()) for name in CATEGORIES},
        "entropy": [float(stats[i].mean("entropy").mean()) for i in layers],
        "entropy_text": [float(stats[i].mean("entropy_text").mean()) for i in layers],
        "receptive_field": receptive_field(distances["distance"]),
        "receptive_field_text": receptive_field(distances["distance_text"]),
    }  # fmt: skip
    if bare is not None:
        result["entropy_without_meta_tokens"] = [float(bare[i].mean("entropy").mean()) for i in layers]
    return result


def specialisation(stats: dict[str, Stats], branch: str) -> dict[str, Any]:
    """Mass on each meta token by domain in the last layer that has the branch, mean over its heads."""
    layer = max(next(iter(stats.values()))[branch])
    mass = torch.stack([by_branch[branch][layer].mean("meta_columns").mean(0) for by_branch in stats.values()])
    return {
        "layer": layer, "domains": list(stats), "mass": mass, "distance": total_variation(mass),
    }  # fmt: skip


def analyse(
    model: Any, texts: dict[str, list[Tensor]], num_channels: int, maps: Maps | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(results by domain and of the meta tokens, reason by what was left out). Raises UserError: no branch at all."""
    has_meta = model.config.num_memory_tokens > 0
    left_out: dict[str, str] = {}
    stats, domains = {}, {}
    for number, (domain, sequences) in enumerate(texts.items()):
        stats[domain] = collect(model, sequences, num_channels, maps if number == 0 else None)
        with without_meta_tokens(model):
            bare = collect(model, sequences, num_channels) if has_meta else None
        domains[domain] = {
            branch: summarise(stats[domain][branch], bare[branch] if bare else None)
            for branch in BRANCHES
            if stats[domain][branch]
        }
    present = [branch for branch in BRANCHES if next(iter(stats.values()))[branch]]
    left_out |= {branch: "the model has no such branch" for branch in BRANCHES if branch not in present}
    results: dict[str, Any] = {"domains": domains}
    if has_meta:
        results["meta_tokens"] = {branch: specialisation(stats, branch) for branch in present}
    else:
        left_out["meta tokens"] = "the model has none"
    return results, left_out


def main(argv: Sequence[str]) -> int:
    """``hymba analyze attention``; returns the exit code. Raises UserError."""
    parser = common.make_parser("attention", "where attention heads and the SSM's implied attention look")
    add_model_arguments(parser)
    common.add_text_arguments(parser, sequences=2, length=512)
    parser.add_argument(
        "--ssm-channels", type=int, default=64, metavar="N", help="SSM channels of a layer (default 64)"
    )
    parser.add_argument("--layers", metavar="LIST", help="layers of the maps (default: first, second, middle, last)")
    parser.add_argument("--heads", metavar="LIST", default="0,1,2", help="attention heads of the maps (default 0,1,2)")
    args = parser.parse_args(argv)
    common.require_positive(args, "sequences", "length", "ssm_channels")
    common.make_directory(args.output)
    loaded = load_from(args)
    model = loaded.model
    maps = _chosen_maps(args, model.config)
    texts = read_texts(loaded, args)
    results, left_out = analyse(model, texts, args.ssm_channels, maps)
    settings = {
        "model": args.model, "ssm_channels": min(args.ssm_channels, model.config.inner_size),
        "num_meta_tokens": model.config.num_memory_tokens, "heads": maps.heads, "map_layers": maps.layers,
        "sequences": {domain: [len(sequence) for sequence in sequences] for domain, sequences in texts.items()},
        "first_token_is_bos": all(int(s[0]) == loaded.token_ids.bos for rows in texts.values() for s in rows),
    }  # fmt: skip
    common.write_json(args.output, "attention", settings, {**results, "left_out": left_out})
    _print(results, left_out)
    common.print_files(args.output, ["attention.json", *draw(results, maps, args.output, MAP_TOKENS)])
    return 0


def _chosen_maps(args: Any, config: Any) -> Maps:
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    heads = common.parse_numbers("--heads", args.heads, least=0)
    if args.layers is None:
        layers = sorted({0, min(1, num_layers - 1), (num_layers - 1) // 2, num_layers - 1})
    else:
        layers = common.parse_numbers("--layers", args.layers, least=0)
    if max(layers) >= num_layers:
        raise UserError(f"--layers {args.layers}: the layers are 0..{num_layers - 1}")
    if args.heads == "0,1,2":
        heads = [head for head in heads if head < num_heads]
    elif max(heads) >= num_heads:
        raise UserError(f"--heads {args.heads}: the heads are 0..{num_heads - 1}")
    return Maps(layers, heads)


def _print(results: dict[str, Any], left_out: dict[str, str]) -> None:
    domains = results["domains"]
    for branch in next(iter(domains.values())):
        parts = [found[branch] for found in domains.values()]
        layers = [_cells([_layer(part, row) for part in parts]) for row in range(len(parts[0]["layers"]))]
        names = [str(layer) for layer in parts[0]["layers"]]
        common.print_table(["layer", *COLUMNS], _rows(names, layers), f"{branch}, mean over domains and heads")
        whole = [_cells([_layer(part, row) for row in range(len(part["layers"]))]) for part in parts]
        fields = [[f"{p['receptive_field']:.1f}", f"{p['receptive_field_text']:.1f}"] for p in parts]
        columns = ["domain", *COLUMNS, "receptive field", "over text alone"]
        common.print_table(columns, _rows(domains, whole, fields), f"{branch}, mean over layers and heads")
    for branch, found in results.get("meta_tokens", {}).items():
        distances = [[f"{float(value):.3f}" for value in values] for values in found["distance"]]
        title = f"meta tokens, {branch}, layer {found['layer']}: distance between domains (0 alike, 1 disjoint)"
        common.print_table(["domain", *found["domains"]], _rows(found["domains"], distances), title)
    for what, reason in left_out.items():
        print(f"left out: {what}: {reason}")


COLUMNS = [*CATEGORIES, "entropy", "over text alone", "without meta tokens"]


def _layer(part: dict[str, Any], row: int) -> list[float]:
    """What COLUMNS name, of one layer."""
    bare = part.get("entropy_without_meta_tokens")
    mass = [sum(part["mass"][name][row]) / len(part["mass"][name][row]) for name in CATEGORIES]
    return [*mass, part["entropy"][row], part["entropy_text"][row], bare[row] if bare else float("nan")]


def _cells(rows: list[list[float]]) -> list[str]:
    means = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
    return ["-" if math.isnan(value) else f"{value:.3f}" for value in means]


def _rows(names: Iterable[str], *parts: list[list[str]]) -> list[list[str]]:
    return [[name, *(cell for row in rows for cell in row)] for name, *rows in zip(names, *parts, strict=True)]
