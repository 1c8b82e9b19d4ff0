"""Denominators with a name, and means over the right interval."""

from __future__ import annotations

import pytest
import torch

from hymba_train.train.metrics import Peak, ThroughputMeter, device_peak, peak_of


@pytest.mark.parametrize(
    ("device", "dtype", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
    ],
)
def test_known_devices(device, dtype, teraflops):
    peak = device_peak(device, dtype)
    assert peak.flops == teraflops * 1e12
    assert f"{teraflops:g} TFLOP/s" in peak.name and dtype in peak.name


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("NVIDIA RTX A1000", "bf16"),  # no A100
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("NVIDIA H200", "float32"),
        ("Some Future GPU", "bf16"),
    ],
)
def test_unknown_is_not_guessed(device, dtype):
    peak = device_peak(device, dtype)
    assert peak.flops is None and peak.name.startswith("n/a") and device in peak.name


def test_a_cpu_has_no_mfu():
    assert peak_of(torch.device("cpu"), "bf16", None).flops is None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_leaves_out_pauses_and_restarts():
    clock = Clock()
    meter = ThroughputMeter(torch.device("cpu"), 2, Peak(1e6, "test"), clock)
    for _ in range(2):
        clock.now += 5
        meter.count(num_tokens=1000, flops_per_token=500, executed_flops_per_token=400)
    meter.pause()
    clock.now += 100  # an evaluation
    meter.resume()
    assert meter.read() == {
        "step_seconds": 5.0,
        "tokens_per_second": 200.0,
        "tflops_per_second_per_device": 1000 * 1000 / 10 / 2 / 1e12,
        "mfu": 1000 * 1000 / 10 / 2 / 1e6,
        "mfu_executed": 1000 * 800 / 10 / 2 / 1e6,
        "memory_gib": None,
    }
    meter.pause()
    meter.restart()
    clock.now += 50  # the new interval starts paused
    meter.resume()
    clock.now += 2
    meter.count(num_tokens=10, flops_per_token=1)
    read = meter.read()
    assert read["tokens_per_second"] == 5.0 and read["mfu_executed"] == read["mfu"]


def test_without_a_peak_there_is_no_mfu():
    assert ThroughputMeter(torch.device("cpu"), 1, Peak(None, "n/a")).read()["mfu"] is None
    assert ThroughputMeter(torch.device("cpu"), 1, Peak(None, "n/a")).read()["mfu_executed"] is None


def test_memory_that_torch_does_not_see_counts(monkeypatch):
    for name, value in {"reset_peak_memory_stats": None, "max_memory_allocated": 2 << 30}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    meter = ThroughputMeter(torch.device("cuda"), 1, Peak(None, "n/a"), hidden_bytes=lambda: 3 << 30)
    assert meter.read()["memory_gib"] == 5.0
