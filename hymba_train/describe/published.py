"""What of a model the Hugging Face format cannot say, as our own code reads it. Plain Python, no torch."""

from __future__ import annotations

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.stack import resolve_stack


def export_obstacles(model: ModelConfig) -> list[str]:
    """One line for every key with which there is no export, nor anything that runs through one (hymba generate, the
    evaluation of tasks)."""
    if any(layer.mixer == "mamba2" for layer in resolve_stack(model)):
        return [f"model.layer_pattern={model.layer_pattern}: the Hugging Face format of Hymba has no mamba2 layers"]
    return []
