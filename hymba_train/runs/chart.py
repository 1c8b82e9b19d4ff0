"""Curves as text: two by four dots a character (Unicode braille)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hymba_train.callbacks.progress import format_count

# Bit of each dot in a braille character, by column and row within it.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_EMPTY = 0x2800


def chart(xs: Sequence[float], ys: Sequence[float], width: int, height: int, x_label: str, y_format: str) -> list[str]:
    """Lines of text: ``ys`` over ``xs``, ``width`` x ``height`` characters without the axes.

    Points that are not finite are left out. ``y_format`` as in format(): '.3f'. Neighbouring points are joined.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ["(nothing to draw)"]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    grid = [[0] * width for _ in range(height)]

    def place(x: float, y: float) -> tuple[int, int]:
        column = 0 if high_x == low_x else round((x - low_x) / (high_x - low_x) * (2 * width - 1))
        row = 0 if high_y == low_y else round((high_y - y) / (high_y - low_y) * (4 * height - 1))
        return column, row

    places = [place(x, y) for x, y in points]
    for before, after in zip([places[0], *places], places, strict=False):
        for column, row in _line(before, after):
            grid[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    labels = [format(high_y, y_format), *[""] * (height - 2), format(low_y, y_format)] if height > 1 else [""]
    margin = max(map(len, labels))
    rows = [
        f"{label:>{margin}} ┤" + "".join(chr(_EMPTY + bits) for bits in row)
        for label, row in zip(labels, grid, strict=True)
    ]
    left, right = format_count(low_x), f"{format_count(high_x)} {x_label}"
    return [*rows, " " * (margin + 2) + left + right.rjust(max(width - len(left), len(right) + 1))]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Dots from ``start`` to ``end``."""
    (x0, y0), (x1, y1) = start, end
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    return [(round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)) for i in range(steps + 1)]
