"""Logging never stops training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from hymba_train.callbacks.base import Callback

logger = logging.getLogger(__name__)
HOOKS = (*(name for name in vars(Callback) if name.startswith("on_")), "close")


class NeverFatal(Callback):
    """Passes every hook on to ``inner``. The first exception is reported once and silences ``inner`` for good, but for
    ``close``: what it has opened is released all the same."""

    def __init__(self, inner: Callback) -> None:
        self.inner, self.broken = inner, False

    def _pass_on(self, hook: str, *args: Any) -> None:
        if self.broken and hook != "close":
            return
        try:
            getattr(self.inner, hook)(*args)
        except Exception as error:
            if self.broken:  # said already
                return
            self.broken = True
            logger.warning(
                "%s failed in %s (%s: %s) and is off from now on; training goes on",
                type(self.inner).__name__, hook, type(error).__name__, error,
            )  # fmt: skip


def _make(hook: str) -> Callable[..., None]:
    def passed_on(self: NeverFatal, *args: Any) -> None:
        self._pass_on(hook, *args)

    passed_on.__name__ = hook
    return passed_on


for _hook in HOOKS:
    setattr(NeverFatal, _hook, _make(_hook))
