"""Versions, and whether what is installed can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import hymba_train
from hymba_train.doctor.report import BAD, WARN, Finding

# Distribution, what imports it, and whether training needs it.
PACKAGES = (
    ("torch", "torch", True),
    ("megatron-core", "megatron.core", True),
    ("numpy", "numpy", True),
    ("hydra-core", "hydra", True),
    ("tokenizers", "tokenizers", True),
    ("safetensors", "safetensors", True),
    ("triton", "triton", False),
    ("transformer-engine", "transformer_engine.pytorch", False),
    ("mamba-ssm", "mamba_ssm", False),
    ("causal-conv1d", "causal_conv1d", False),
    ("flash-attn", "flash_attn", False),
    ("transformers", "transformers", False),
    ("wandb", "wandb", False),
)


def packages() -> list[Finding]:
    """One line a package: its version, and the error if it is there and cannot be imported."""
    findings = []
    for name, module, needed in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", BAD, f"pip install {name}") if needed else
                            Finding(name, "not installed"))  # fmt: skip
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a wrong ABI raises OSError, RuntimeError and others
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            advice = f"cannot be imported: {reason}; reinstall it for this torch and CUDA, or uninstall it"
            findings.append(Finding(name, version, BAD, advice))
        else:
            findings.append(Finding(name, version))
    return findings


def system() -> list[Finding]:
    """Python, operating system, processor, memory, time."""
    import psutil

    memory = psutil.virtual_memory()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [
        Finding("hymba_train", hymba_train.__version__),
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Finding("processor", f"{cpus} cores; {_processor()}"),
        Finding("memory", f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} GiB free"),
        Finding("shared memory", *_shared_memory()),
        Finding("time", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())),
    ]
    slurm = {k: v for k, v in os.environ.items() if k in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME")}
    if slurm:
        findings.append(Finding("slurm", " ".join(f"{k}={v}" for k, v in sorted(slurm.items()))))
    return findings


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def _shared_memory() -> tuple[str, str, str] | tuple[str]:
    """/dev/shm: NCCL and the checkpoint writers use it, and containers often leave 64 MiB."""
    try:
        size = shutil.disk_usage("/dev/shm").total / 2**30
    except OSError:
        return ("none",)
    if size < 1:
        return (f"{size:.2f} GiB", WARN, "small: start the container with --ipc=host or --shm-size=16g")
    return (f"{size:.0f} GiB",)


def drivers() -> list[Finding]:
    """CUDA, driver, NCCL, and every GPU that torch sees, held against what nvidia-smi sees."""
    import torch

    listed = _nvidia_smi()
    count = torch.cuda.device_count()
    findings = [Finding("torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")]
    if listed is None:
        findings.append(Finding("driver", "no nvidia-smi here"))
    elif isinstance(listed, str):
        findings.append(Finding("driver", "nvidia-smi fails", BAD, listed))
    else:
        findings += [Finding("driver", listed[0][1] if listed else "no GPU")]
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if len(listed) > count and hidden is None:
            advice = "torch sees fewer: install a CUDA build of torch that this driver can run"
            findings.append(Finding("GPUs", f"{len(listed)} by nvidia-smi, {count} by torch", BAD, advice))
    if count:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        findings.append(Finding("NCCL", version))
        for index in range(count):
            p = torch.cuda.get_device_properties(index)
            text = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
            findings.append(Finding(f"GPU {index}", text))
    else:
        findings.append(Finding("GPUs", "none: training runs on the CPU"))
    return findings


def _nvidia_smi() -> list[list[str]] | str | None:
    """Rows of (name, driver version); an error text; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "no answer within 60 s"
    if done.returncode:
        return " ".join(f"{done.stdout} {done.stderr}".split())[:200]
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
