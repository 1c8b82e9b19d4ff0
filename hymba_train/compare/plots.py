"""Plots of a comparison, PNG: loss against tokens, FLOPs and seconds; recall and throughput against cache."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.compare.results import CACHE_TOKENS, MemberResult, mean_and_spread
from hymba_train.figures import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH = 9
"""Logged steps whose losses are averaged: the curves are of training loss, a noisy thing."""
AXES = {"tokens": "text tokens", "flops": "training FLOPs", "seconds": "seconds of training steps"}


def draw_all(directory: Path, members: Sequence[MemberResult], title: str) -> list[Path]:
    """Draw what there is to draw into ``directory``; returns the files."""
    plt = pyplot()
    made = []
    for axis in AXES:
        figure, axes = plt.subplots(figsize=(8, 5))
        drawn = [_draw_curve(axes, number, member, axis) for number, member in enumerate(members)]
        if any(drawn):
            axes.set(xlabel=AXES[axis], ylabel="training loss (nats per token)", title=title)
            made.append(_save(figure, axes, directory / f"loss_{axis}.png"))
        plt.close(figure)
    for measure, label, name in (
        ("mean_recall", "recall accuracy, mean of the tasks", "recall_cache.png"),
        ("tokens_per_second", "training tokens per second", "throughput_cache.png"),
    ):
        figure, axes = plt.subplots(figsize=(7, 5))
        drawn = [_draw_point(axes, number, member, measure) for number, member in enumerate(members)]
        if any(drawn):
            axes.set(
                xscale="log", xlabel=f"cache of a sequence of {CACHE_TOKENS:,} tokens (MB)", ylabel=label, title=title,
                ylim=(0, None),
            )  # fmt: skip
            made.append(_save(figure, axes, directory / name))
        plt.close(figure)
    return made


def _draw_curve(axes: Axes, number: int, member: MemberResult, axis: str) -> bool:
    """Mean over the seeds, and the range between them; one colour a member."""
    curves = [run.curve for run in member.runs if run.curve]
    steps = sorted(set.intersection(*({p.step for p in curve} for curve in curves))) if curves else []
    if len(steps) < 2:
        return False
    at = [{p.step: p for p in curve} for curve in curves]
    x = [statistics.fmean(getattr(points[step], axis) for points in at) for step in steps]
    losses = [_smooth([points[step].loss for step in steps]) for points in at]
    mean = [statistics.fmean(values) for values in zip(*losses, strict=True)]
    axes.plot(x, mean, color=f"C{number}", linewidth=1.2, label=f"{member.name} ({len(curves)} seeds)")
    if len(curves) > 1:
        low, high = ([f(values) for values in zip(*losses, strict=True)] for f in (min, max))
        axes.fill_between(x, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    return True


def _smooth(values: list[float]) -> list[float]:
    """Mean of the last SMOOTH values at each place."""
    return [statistics.fmean(values[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(values))]


def _draw_point(axes: Axes, number: int, member: MemberResult, measure: str) -> bool:
    found = mean_and_spread(member.values(measure))
    if found is None:
        return False
    x = member.cache_bytes / 1e6
    axes.errorbar(x, found[0], yerr=found[1], fmt="o", capsize=3, color=f"C{number}", label=member.name)
    axes.annotate(member.name, (x, found[0]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    return True


def _save(figure: Figure, axes: Axes, path: Path) -> Path:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight", format="png")
    return path
