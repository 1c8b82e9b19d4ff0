"""Shapes of a learning rate's decay. A word here is a word that the schema accepts and that a run can follow."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "exponential": lambda x: 2.0 * 0.5**x - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""schedule.lr_wsd_decay_style -> share of (peak - minimum) that is left when the share x of the decay has passed; x in
[0, 1], from 1 down to 0."""
STYLES = ("wsd", "cosine", "linear", "constant")
"""schedule.lr_decay_style; cosine and linear are DECAYS over all that follows the warm-up."""
