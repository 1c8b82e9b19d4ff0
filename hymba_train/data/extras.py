"""Packages that only some uses need: the extra ``data`` of setup.py."""

from __future__ import annotations

import importlib
from types import ModuleType

from hymba_train.errors import UserError


def import_extra(module: str, purpose: str) -> ModuleType:
    """Import ``module``. Raises UserError that says what it is for and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there, but broken: its own message says how
        raise UserError(f"{purpose} needs the package {module}: pip install 'hymba-train[data]'") from error
