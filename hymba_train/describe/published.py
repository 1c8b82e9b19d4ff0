"""What of a model the Hugging Face format cannot say, as our own code reads it. Plain Python, no torch."""

from __future__ import annotations

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.stack import resolve_stack, used_mixers


def export_obstacles(model: ModelConfig) -> list[str]:
    """One line for every key with which there is no export, nor anything that runs through one (hymba generate, the
    evaluation of tasks)."""
    return [
        f"model.layer_pattern={model.layer_pattern}: the Hugging Face format of Hymba has no {mixer.name} layers"
        for mixer in used_mixers(resolve_stack(model))
        if not mixer.in_published_format
    ]
