"""The loop of the callbacks' tests."""

from tests.callbacks.conftest import loop_of

__all__ = ["loop_of"]
