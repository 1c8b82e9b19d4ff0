"""Held-out loss of every validation domain."""

from __future__ import annotations

from collections.abc import Callable

from hymba_train.config.schema import PhaseConfig
from hymba_train.data import TrainingData, validation_batches
from hymba_train.parallel.fp8_state import Fp8State
from hymba_train.train.step import Stepper


def make_evaluate(
    data: TrainingData, stepper: Stepper, runtime, current_phase: Callable[[], PhaseConfig], fp8: Fp8State
) -> Callable[[], dict[str, float]]:
    """A function domain -> mean loss in nats per labelled token, at the current phase's sequence length.

    It is collective, and leaves ``fp8`` as it was. The sequences are the same every time and under every layout; the
    loss is exact over all ranks.
    """

    def evaluate() -> dict[str, float]:
        phase = current_phase()
        losses = {}
        for domain in data.validation_domains:
            batches = validation_batches(
                data, domain, phase.seq_length, micro_batch_size=phase.micro_batch_size,
                data_parallel_rank=runtime.data_parallel_rank, data_parallel_size=runtime.data_parallel_size,
            )  # fmt: skip
            with fp8.untouched():
                loss_sum, num_tokens = stepper.evaluate(batches)
            losses[domain] = loss_sum / max(num_tokens, 1)
        return losses

    return evaluate
