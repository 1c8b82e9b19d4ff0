"""Names of figures in TensorBoard and Weights & Biases, the same in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationResult
    from hymba_train.train.metrics import StepMetrics


def train_scalars(m: StepMetrics) -> dict[str, float]:
    """StepMetrics -> name: value; figures that do not exist on this device are left out."""
    values = {
        "train/loss": m.loss,
        "train/grad_norm": m.grad_norm,
        "train/lr": m.lr,
        "train/batch_size": m.batch_size,
        "train/seq_length": m.seq_length,
        "speed/step_seconds": m.step_seconds,
        "speed/tokens_per_second": m.tokens_per_second,
        "speed/tflops_per_second_per_device": m.tflops_per_second_per_device,
        "speed/mfu": m.mfu,
        "speed/mfu_executed": m.mfu_executed,
        "memory/max_allocated_gib": m.memory_gib,
    }
    values |= {f"train/{name}": value for name, value in (m.objective or {}).items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def evaluation_scalars(result: EvaluationResult) -> dict[str, float]:
    """Its figures as name: value, below the evaluation's name."""
    return {f"{result.name}/{name}": value for name, value in result.figures.items()}
