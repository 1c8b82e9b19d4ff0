"""Names of figures in TensorBoard and Weights & Biases, the same in both."""

from __future__ import annotations


def train_scalars(m) -> dict[str, float]:
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


def validation_scalars(losses: dict[str, float]) -> dict[str, float]:
    """Domain -> held-out loss, as name: value."""
    return {f"validation/{domain}/loss": loss for domain, loss in losses.items()}


def recall_scalars(scores: dict[str, dict]) -> dict[str, float]:
    """Task -> scores, as name: value."""
    return {f"recall/{task}/{name}": found[name] for task, found in scores.items() for name in ("accuracy", "loss")}
