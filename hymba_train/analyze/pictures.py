"""What the pictures have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hymba_train.errors import UserError
from hymba_train.figures import pyplot

COLOURS = {"meta": "#8172b3", "bos": "#c44e52", "self": "#55a868", "cross": "#4c72b0"}
BRANCHES = {"attention": "#4c72b0", "ssm": "#dd8452"}


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a PNG file and close the figure. Raises UserError if it cannot be written."""
    try:
        figure.savefig(path, dpi=dpi, bbox_inches="tight", format="png")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error
    finally:
        pyplot().close(figure)


def heat_map(axes: Any, values: Any, *, title: str, low: float | None = None, high: float | None = None) -> Any:
    """A matrix as a picture with a scale beside it; returns the image."""
    values = values.numpy() if hasattr(values, "numpy") else values
    image = axes.imshow(values, aspect="auto", interpolation="nearest", vmin=low, vmax=high, cmap="viridis")
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03).ax.tick_params(labelsize=7)
    return image


def grid(plt: Any, rows: int, columns: int, width: float = 3.0, height: float = 2.6) -> tuple[Any, Any]:
    """Figure and [rows, columns] axes, always a matrix."""
    return plt.subplots(
        rows, columns, figsize=(width * columns + 0.5, height * rows + 0.3), squeeze=False, layout="constrained"
    )
