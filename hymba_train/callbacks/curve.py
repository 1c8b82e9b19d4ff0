"""loss_curves.png: training and held-out loss over tokens, drawn at the end from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.jsonl import read_events


class LossCurve(Callback):
    """Draws the whole run, restarts included, when training ends."""

    def __init__(self, metrics_path: Path, image_path: Path, title: str) -> None:
        self.metrics_path, self.image_path, self.title = metrics_path, image_path, title

    def on_train_end(self, loop) -> None:
        draw(self.metrics_path, self.image_path, self.title)


def draw(metrics_path: Path, image_path: Path, title: str) -> None:
    """Draw ``image_path`` (PNG) from the lines of ``metrics_path``; nothing if no step was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = read_events(metrics_path, "train")
    if not train:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot([r["tokens"] for r in train], [_number(r["loss"]) for r in train], label="training", linewidth=1)
    held_out = read_events(metrics_path, "validation")
    for domain in sorted({name for record in held_out for name in record["loss"]}):
        points = [(r["tokens"], _number(r["loss"][domain])) for r in held_out if domain in r["loss"]]
        axes.plot(*zip(*points, strict=True), label=f"held out: {domain}", marker="o", markersize=3)
    axes.set(xlabel="text tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image_path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
