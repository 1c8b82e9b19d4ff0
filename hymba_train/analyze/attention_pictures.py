"""Pictures of ``hymba analyze attention``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hymba_train.analyze import pictures
from hymba_train.analyze.head_stats import CATEGORIES

if TYPE_CHECKING:
    from hymba_train.analyze.attention import Maps

NAMES = {"attention": "attention heads", "ssm": "SSM (implied attention)"}
FLOOR = 1e-4  # maps are drawn as logarithms, from here up


def draw(results: dict[str, Any], maps: Maps, output: Path, map_tokens: int) -> list[str]:
    """All pictures into ``output``; returns their names. Raises UserError."""
    domains = list(results["domains"].values())
    branches = [branch for branch in NAMES if branch in domains[0]]
    draw_mass(domains, branches, output / "attention_mass.png")
    draw_heads(domains, branches, output / "attention_heads.png")
    draw_entropy(results["domains"], branches, output / "attention_entropy.png")
    names = ["attention_mass.png", "attention_heads.png", "attention_entropy.png"]
    if maps.attention or maps.ssm:
        draw_maps(maps, output / "attention_maps.png", map_tokens)
        names.append("attention_maps.png")
    if "meta_tokens" in results:
        draw_meta(results["meta_tokens"], output / "attention_meta.png")
        names.append("attention_meta.png")
    return names


def _mass(domains: list[dict[str, Any]], branch: str, category: str) -> np.ndarray:
    """[layers, heads], mean over domains."""
    return np.mean([domain[branch]["mass"][category] for domain in domains], axis=0)


def draw_mass(domains: list[dict[str, Any]], branches: list[str], path: Path) -> None:
    """Where the mass of a layer lies: stacked shares by category, mean over heads and domains."""
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, 1, len(branches), width=5.0, height=3.2)
    for ax, branch in zip(axes[0], branches, strict=True):
        layers, bottom = domains[0][branch]["layers"], 0.0
        for category in CATEGORIES:
            height = _mass(domains, branch, category).mean(1)
            ax.bar(layers, height, bottom=bottom, color=pictures.COLOURS[category], label=category, width=0.9)
            bottom = bottom + height
        ax.set(xlabel="layer", ylabel="share of the mass", ylim=(0, 1), title=NAMES[branch])
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    pictures.save(figure, path)


def draw_heads(domains: list[dict[str, Any]], branches: list[str], path: Path) -> None:
    """Shares of every head of every layer, a map for each category."""
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, len(branches), len(CATEGORIES), width=3.0, height=2.8)
    for row, branch in zip(axes, branches, strict=True):
        for ax, category in zip(row, CATEGORIES, strict=True):
            values = _mass(domains, branch, category)
            pictures.heat_map(ax, values, title=f"{NAMES[branch]}: {category}", low=0, high=1)
            layers = domains[0][branch]["layers"]
            ax.set(xlabel="head" if branch == "attention" else "channel", ylabel="layer")
            ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    pictures.save(figure, path)


def draw_entropy(domains: dict[str, Any], branches: list[str], path: Path) -> None:
    """Mean entropy of a layer's heads, a line for each domain."""
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, 1, len(branches), width=5.0, height=3.2)
    lines = {"entropy": ("with meta tokens", "-"), "entropy_without_meta_tokens": ("without", "--")}
    for ax, branch in zip(axes[0], branches, strict=True):
        for number, (domain, found) in enumerate(domains.items()):
            for key, (label, style) in lines.items():
                if key in found[branch]:
                    ax.plot(
                        found[branch]["layers"], found[branch][key], style, color=f"C{number}", marker=".",
                        label=f"{domain}, {label}",
                    )  # fmt: skip
        ax.set(xlabel="layer", ylabel="entropy (nats)", title=NAMES[branch])
        ax.grid(alpha=0.3)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    pictures.save(figure, path)


def draw_maps(maps: Maps, path: Path, map_tokens: int) -> None:
    """One row a layer: the chosen heads, and the mean over the SSM's channels, of the first ``map_tokens`` tokens."""
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, len(maps.layers), len(maps.heads) + 1, width=2.7, height=2.4)
    for row, layer in zip(axes, maps.layers, strict=True):
        found = [
            (f"layer {layer}, head {h}", m) for h, m in zip(maps.heads, maps.attention.get(layer, ()), strict=False)
        ]
        found += [(f"layer {layer}, SSM", maps.ssm[layer])] if layer in maps.ssm else []
        for ax in row[len(found) :]:
            ax.axis("off")
        for ax, (title, values) in zip(row, found, strict=False):
            shown = values[:map_tokens, :map_tokens].clamp(min=FLOOR).log10()
            pictures.heat_map(ax, shown, title=f"{title} (log10)", low=np.log10(FLOOR), high=0)
    pictures.save(figure, path)


def draw_meta(found: dict[str, Any], path: Path) -> None:
    """Mass on each meta token by domain, in the layer that :func:`specialisation` took."""
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, len(found), 1, width=8.0, height=2.2)
    for (ax,), (branch, part) in zip(axes, found.items(), strict=True):
        pictures.heat_map(ax, part["mass"], title=f"mass on each meta token, {NAMES[branch]}, layer {part['layer']}")
        ax.set_yticks(range(len(part["domains"])), part["domains"])
        ax.set_xlabel("meta token")
    pictures.save(figure, path)
