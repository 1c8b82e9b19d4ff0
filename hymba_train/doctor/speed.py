"""Figures that show a sick machine: GPU memory, matrix products, all-reduce, disk. Short, not a benchmark."""

from __future__ import annotations

import os
import re
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hymba_train.doctor.report import BAD, WARN, Finding

# Memory bandwidth from NVIDIA's data sheets, bytes/s; the first match counts.
BANDWIDTH = (
    ("B200", 8.0e12), ("GH200", 4.0e12), ("H200", 4.8e12), ("H100 PCIe", 2.0e12), ("H100 NVL", 3.9e12),
    ("H100", 3.35e12), ("A100-SXM4-80GB", 2.04e12), ("A100 80GB", 1.94e12), ("A100", 1.56e12),
)  # fmt: skip
LOW_BANDWIDTH, LOW_MATMUL = 0.6, 0.4  # of the data sheet: below is a warning
LOW_DISK_BYTES = 100e6  # per second
REPEATS = 10


def gpu(quick: bool) -> list[Finding]:
    """Every GPU of this process: copy speed, product speed, and an exact product."""
    import torch

    if not torch.cuda.is_available():
        return [Finding("GPU", "none"), _exact_product("cpu")]
    mine = [int(os.environ["LOCAL_RANK"])] if "LOCAL_RANK" in os.environ else range(torch.cuda.device_count())
    findings = []
    for index in mine:
        device = torch.device("cuda", index)
        name = torch.cuda.get_device_name(device)
        findings.append(_memory(device, name, quick))
        findings.append(_products(device, name, quick))
        findings.append(_exact_product(device))
    return findings


def _seconds(work: Callable[[], Any], device: Any) -> float:
    """Median time of ``work``, after a warm-up."""
    import torch

    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            work()
            end.record()
            end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _memory(device: Any, name: str, quick: bool) -> Finding:
    import torch

    size = 2**28 if quick else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    speed = 2 * size / _seconds(lambda: target.copy_(source), device)
    peak = next((value for known, value in BANDWIDTH if re.search(rf"\b{known}\b", name)), None)
    return _against_peak(f"GPU {device.index} memory", speed, peak, LOW_BANDWIDTH, 1e9, "GB/s")


def _products(device: Any, name: str, quick: bool) -> Finding:
    import torch

    from hymba_train.train.metrics import device_peak

    size = 4096 if quick else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    speed = 2 * size**3 / _seconds(lambda: a @ b, device)
    return _against_peak(
        f"GPU {device.index} bf16 products", speed, device_peak(name, "bf16").flops, LOW_MATMUL, 1e12, "TFLOP/s"
    )


def _against_peak(label: str, speed: float, peak: float | None, low: float, unit: float, word: str) -> Finding:
    text = f"{speed / unit:,.0f} {word}"
    if peak is None:
        return Finding(label, text)
    text += f" ({speed / peak:.0%} of the data sheet)"
    if speed < low * peak:
        return Finding(label, text, WARN, "slow: another process, a power limit, heat, or a sick GPU")
    return Finding(label, text)


def _exact_product(device: Any) -> Finding:
    """Small integers have exact products, whatever the order of summation: any difference is a defect."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, (512, 512), generator=generator) for _ in range(2))
    product = (a.to(device, torch.float32) @ b.to(device, torch.float32)).cpu()
    label = f"{device} exact product" if str(device) == "cpu" else f"GPU {device.index} exact product"
    if torch.equal(product, (a @ b).float()):
        return Finding(label, "right")
    return Finding(label, "wrong", BAD, "this device computes wrong results: take it out of use")


def disk(directory: Path, quick: bool) -> list[Finding]:
    """Write speed of ``directory``, to the disk itself (fsync)."""
    size = 2**25 if quick else 2**28
    path = directory / f".doctor.{secrets.token_hex(8)}"
    block = secrets.token_bytes(2**22)
    label = "disk"
    try:
        start = time.monotonic()
        with open(path, "wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = size / (time.monotonic() - start)
    except OSError as error:
        return [
            Finding(
                label, f"{directory.absolute()} cannot be written", BAD, f"{error.strerror}; give another --directory"
            )
        ]
    finally:
        path.unlink(missing_ok=True)
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    text = f"{speed / 1e6:,.0f} MB/s written, {free / 2**30:,.0f} GiB free in {directory.absolute()}"
    if speed < LOW_DISK_BYTES:
        return [Finding(label, text, WARN, "slow: checkpoints will take long")]
    return [Finding(label, text)]
