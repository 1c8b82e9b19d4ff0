"""The stack as a picture: one box a layer, its span, who computes keys and values for whom, where stages end."""

from __future__ import annotations

from pathlib import Path

from hymba_train.errors import UserError
from hymba_train.figures import pyplot
from hymba_train.plan.plan import Plan

SPANS = {
    "global": ("attention to everything", "#c44e52"),
    "local": ("attention in a window", "#4c72b0"),
    "-": ("SSM alone", "#55a868"),
}
"""LayerDescription.span -> words of the legend, colour of the box."""
BOX_WIDTH, BOX_HEIGHT = 0.8, 1.0


def draw_stack(plan: Plan, path: Path) -> None:
    """Draw ``plan`` into a PNG file, layer 0 on the left. Raises UserError if it cannot be written."""
    from matplotlib.patches import Patch, Rectangle

    plt, num_layers = pyplot(), len(plan.layers)
    figure, axes = plt.subplots(figsize=(max(6.0, 0.36 * num_layers + 1), 3.2))
    for row in plan.layers:
        layer = row.description
        box = Rectangle((layer.index - BOX_WIDTH / 2, 0), BOX_WIDTH, BOX_HEIGHT, color=SPANS[layer.span][1])
        axes.add_patch(box)
        axes.text(layer.index, BOX_HEIGHT / 2, str(layer.index), ha="center", va="center", color="white", fontsize=8)
        for consumer in layer.kv_consumers if layer.kv_role == "producer" else ():
            axes.annotate(
                "", xy=(consumer, BOX_HEIGHT + 0.02), xytext=(layer.index, BOX_HEIGHT + 0.02),
                arrowprops={"arrowstyle": "->", "connectionstyle": "arc3,rad=-0.6", "color": "0.3"},
            )  # fmt: skip
    for chunk in plan.chunks:
        middle = (chunk.layers.start + chunk.layers.stop - 1) / 2
        name = f"stage {chunk.pipeline_rank}" + (
            f".{chunk.virtual_rank}" if len(plan.chunks) > len(plan.memory) else ""
        )
        axes.text(middle, -0.18, name, ha="center", va="top", fontsize=8)
        if chunk.layers.start:
            axes.axvline(chunk.layers.start - 0.5, color="black", linewidth=1, linestyle=":")
    used = {row.description.span for row in plan.layers}
    axes.legend(
        handles=[Patch(color=colour, label=words) for span, (words, colour) in SPANS.items() if span in used],
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=8,
    )  # fmt: skip
    axes.set(
        xlim=(-0.8, num_layers - 0.2), ylim=(-0.5, 2.2), title=f"{plan.config.model.name}: arrows carry keys and values"
    )
    axes.axis("off")
    try:
        figure.savefig(path, dpi=140, bbox_inches="tight", format="png")
    except OSError as error:
        raise UserError(f"--png {path}: cannot be written ({error.strerror or error})") from error
    finally:
        plt.close(figure)
