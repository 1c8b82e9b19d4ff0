"""loss_curves.png: losses and throughput over tokens, drawn from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.jsonl import Line, counting, read_lines
from hymba_train.figures import pyplot

if TYPE_CHECKING:
    from hymba_train.train.loop import Loop


class LossCurve(Callback):
    """Draws the whole run, restarts included, when training ends."""

    def __init__(self, metrics_path: Path, image_path: Path, title: str) -> None:
        self.metrics_path, self.image_path, self.title = metrics_path, image_path, title

    def on_train_end(self, loop: Loop) -> None:
        draw(read_lines(self.metrics_path), self.image_path, self.title)


def draw(lines: Sequence[Line], path: Path, title: str) -> None:
    """Loss, held-out losses and throughput over tokens, as PNG into ``path``; nothing if no step was logged.

    Raises OSError if it cannot be written.
    """
    plt = pyplot()
    train, held_out = counting(lines, "train"), counting(lines, "validation")
    if not train:
        return
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    tokens = [line["tokens"] for line in train]
    top.plot(tokens, [_number(line["loss"]) for line in train], label="training", linewidth=1)
    for domain in sorted({name for line in held_out for name in line["loss"]}):
        points = [(line["tokens"], _number(line["loss"][domain])) for line in held_out if domain in line["loss"]]
        top.plot(*zip(*points, strict=True), label=f"held out: {domain}", marker="o", markersize=3)
    top.set(ylabel="loss (nats per token)", title=title)
    top.legend()
    bottom.plot(tokens, [line["tokens_per_second"] for line in train], linewidth=1)
    bottom.set(xlabel="text tokens", ylabel="tokens per second", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight", format="png")
    finally:
        plt.close(figure)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
