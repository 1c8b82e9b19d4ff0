"""What a step is worth: loss, gradient norm, rate, tokens/s, TFLOP/s, MFU, memory.

MFU is model FLOPs (PaLM, arXiv:2204.02311, appendix B: no recomputation) over what the devices could do at best, and
that denominator is always named. ``mfu`` counts the meta prefix in every sequence, as the model is defined and other
codes compute it; ``mfu_executed`` counts it once a micro-batch, as it is computed here: utilisation proper. A device
that :data:`PEAK_FLOPS` does not know has no MFU: "n/a", never a guess.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Dense matrix products without sparsity, FLOP/s, from NVIDIA's data sheets. A name matches if torch's device name
# contains it as whole words (RTX A1000 is no A100); the first match counts, so the more special name comes first.
PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {"bf16": 2500e12, "fp8": 5000e12}),
    ("B200", {"bf16": 2250e12, "fp8": 4500e12}),
    ("H200 NVL", {"bf16": 835.5e12, "fp8": 1670.5e12}),
    ("H200", {"bf16": 989.5e12, "fp8": 1979e12}),
    ("GH200", {"bf16": 989.5e12, "fp8": 1979e12}),
    ("H100 PCIe", {"bf16": 756.5e12, "fp8": 1513e12}),
    ("H100 NVL", {"bf16": 835.5e12, "fp8": 1670.5e12}),
    ("H100 80GB HBM3", {"bf16": 989.5e12, "fp8": 1979e12}),  # SXM
    ("A100", {"bf16": 312e12}),
)


@dataclass(frozen=True)
class Peak:
    """Denominator of MFU for one device. ``flops`` is None where there is none, and ``name`` says why."""

    flops: float | None
    name: str


def device_peak(device_name: str, dtype: str) -> Peak:
    """Peak of a device by ``torch.cuda.get_device_name`` and ``dtype`` bf16 | fp8 (float32 has none: TF32 is a mode).

    >>> device_peak("NVIDIA H200", "bf16").name
    'H200 bf16 dense 989.5 TFLOP/s'
    """
    if "MIG" in device_name.split():
        return Peak(None, f"n/a: {device_name} is a part of a device")
    for known, peaks in PEAK_FLOPS:
        if re.search(rf"\b{known}\b", device_name):
            if dtype in peaks:
                return Peak(peaks[dtype], f"{known} {dtype} dense {peaks[dtype] / 1e12:g} TFLOP/s")
            return Peak(None, f"n/a: no peak known for {dtype} on {device_name}")
    return Peak(None, f"n/a: no peak known for {device_name}")


def peak_of(device: torch.device, params: str, fp8: str | None) -> Peak:
    """Peak of the device that this process computes on, in the precision of the large matrix products."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return device_peak(name, "fp8" if fp8 else params)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. Loss and norm are those of this step, exact over the global batch; times are means since the
    last logged step."""

    step: int
    phase: str
    loss: float  # nats per labelled token
    grad_norm: float  # global, before clipping
    lr: float
    tokens: int  # text tokens of the run so far
    labelled_tokens: int  # of this step: those with a loss
    batch_size: int  # sequences of this step
    seq_length: int
    step_seconds: float
    tokens_per_second: float
    tflops_per_second_per_device: float
    mfu: float | None  # 0..1, by the model's FLOPs: the meta prefix in every sequence; None: no peak known
    memory_gib: float | None  # peak allocated on this device since the last logged step; None on a CPU
    rank_seconds: tuple[float, ...] = ()  # each rank's own time in the step before, without waiting for others
    batch_hash: str | None = None  # of every token id of the global batch, if logging.batch_hash asks for it
    objective: dict[str, float] | None = None  # further means of the objective; dpo: hymba_train.train.dpo
    mfu_executed: float | None = None  # like mfu, by the FLOPs that are really done: the meta prefix once a micro-batch


class ThroughputMeter:
    """Mean speed since the last :meth:`restart`.

    ``devices`` is the number of ranks. Waits (evaluation, checkpoints) are left out: call :meth:`pause` and
    :meth:`resume` around them. ``hidden_bytes``: memory in use that torch does not count as allocated.
    """

    def __init__(
        self, device: torch.device, devices: int, peak: Peak, clock: Callable[[], float] = time.perf_counter,
        hidden_bytes: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.device, self.devices, self.peak, self._clock = device, devices, peak, clock
        self._hidden_bytes = hidden_bytes
        self._paused_at: float | None = None
        self.restart()

    def restart(self) -> None:
        """Start a new interval, paused if the old one was."""
        self._start, self._steps, self._tokens = self._clock(), 0, 0
        self._flops = self._executed_flops = 0.0
        if self._paused_at is not None:
            self._paused_at = self._start
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def pause(self) -> None:
        self._paused_at = self._clock()

    def resume(self) -> None:
        if self._paused_at is not None:
            self._start += self._clock() - self._paused_at
            self._paused_at = None

    def count(self, num_tokens: int, flops_per_token: float, executed_flops_per_token: float | None = None) -> None:
        """Count one finished optimizer step of ``num_tokens`` text tokens over all ranks.

        ``executed_flops_per_token`` is what mfu_executed counts; None: as many as ``flops_per_token``.
        """
        executed = flops_per_token if executed_flops_per_token is None else executed_flops_per_token
        self._executed_flops += num_tokens * executed
        self._steps += 1
        self._tokens += num_tokens
        self._flops += num_tokens * flops_per_token

    def read(self) -> dict[str, Any]:
        """step_seconds, tokens_per_second, tflops_per_second_per_device, mfu, mfu_executed and memory_gib so far."""
        seconds = max(self._clock() - self._start, 1e-9)
        flops, executed = (total / seconds / self.devices for total in (self._flops, self._executed_flops))
        return {
            "step_seconds": seconds / max(self._steps, 1),
            "tokens_per_second": self._tokens / seconds,
            "tflops_per_second_per_device": flops / 1e12,
            "mfu": None if self.peak.flops is None else flops / self.peak.flops,
            "mfu_executed": None if self.peak.flops is None else executed / self.peak.flops,
            "memory_gib": self._peak_bytes() / 2**30 if self.device.type == "cuda" else None,
        }

    def _peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) + self._hidden_bytes()
