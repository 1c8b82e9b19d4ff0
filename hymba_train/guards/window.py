"""What is usual: median and median deviation of the last accepted values."""

from __future__ import annotations

import statistics
from collections import deque

SIGMAS_OF_A_DEVIATION = 1.4826  # standard deviations of normal noise in one median absolute deviation


class Window:
    """The last ``size`` values. Median statistics: a few odd values among them move nothing."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        self._values.append(value)

    def clear(self) -> None:
        self._values.clear()

    def limit(self, sigmas: float, least: float) -> float:
        """Largest usual value: the median plus ``sigmas`` robust standard deviations, at least plus ``least``."""
        median = statistics.median(self._values)
        deviation = statistics.median(abs(value - median) for value in self._values)
        return median + max(least, sigmas * SIGMAS_OF_A_DEVIATION * deviation)

    def to_list(self) -> list[float]:
        return list(self._values)

    def load(self, values: list[float]) -> None:
        """Take over saved values; the newest ones if there are more than the window holds."""
        self._values.clear()
        self._values.extend(float(value) for value in values)
