"""Callbacks: everything around training that the loop knows only by :class:`hymba_train.callbacks.base.Callback`."""

from hymba_train.callbacks.base import Callback

__all__ = ["Callback"]
