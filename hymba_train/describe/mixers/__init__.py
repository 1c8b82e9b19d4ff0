"""The mixers, a file each: what one holds, computes and keeps. Plain Python, no torch.

A module of this package that has a list ``MIXERS`` of :class:`Mixer` adds them to :data:`MIXERS`; nothing else names
them one by one. docs/extending.md shows how a mixer is added.
"""

from __future__ import annotations

import importlib
import pkgutil

from hymba_train.describe.mixers.base import Mixer, SsdSizes


def _found() -> dict[str, Mixer]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {mixer.name: mixer for module in modules for mixer in getattr(module, "MIXERS", ())}


MIXERS: dict[str, Mixer] = _found()
"""Word in model.layer_pattern -> its mixer."""

__all__ = ["MIXERS", "Mixer", "SsdSizes"]
