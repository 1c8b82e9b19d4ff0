"""Which device the trainings of tests run on: HYMBA_TEST_DEVICE, cpu (gloo, the default) or cuda (NCCL, two GPUs).

The tests' own process stays on the CPU either way: what it compares are files. With cuda a training takes the paths of
a real one: bf16, Transformer Engine's layers, cuDNN's attention, the CUDA scan, the fused kernels, all deterministic.
"""

from __future__ import annotations

import json
import os

DEVICE = os.environ.get("HYMBA_TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda"):
    raise ValueError(f"HYMBA_TEST_DEVICE={DEVICE!r}: known are cpu and cuda")
ON_GPUS = DEVICE == "cuda"
NUM_GPUS = 2

SETTINGS = {
    "run.device": "cuda", "run.deterministic": True, "precision.params": "bf16",
    # Heads of 64 with values of 128, as in the 1.5B; 16 divides what Transformer Engine's products run over.
    "model.hidden_size": 256, "model.ffn_hidden_size": 384, "model.num_attention_heads": 4,
    "model.num_query_groups": 2, "model.num_meta_tokens": 16, "model.mamba_dt_rank": 16, "model.mamba_state_dim": 16,
    "optim.lr": 0.002, "optim.min_lr": 0.0002,
} if ON_GPUS else {}  # fmt: skip
"""What a tiny training has instead of its own, by key."""
OVERRIDES = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
"""The same for a command line."""


def training_variables() -> dict[str, str]:
    """Of the environment of a process that trains."""
    here = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if ON_GPUS else {"CUDA_VISIBLE_DEVICES": ""}
    return {"OMP_NUM_THREADS": "1", **here}


def patience(seconds: float) -> float:
    """A limit of ``seconds`` on a CPU; on GPUs the first steps compile kernels."""
    return 3 * seconds if ON_GPUS else seconds


def what_is_missing() -> str:
    """For the trainings on this machine; empty if nothing is."""
    if not ON_GPUS:
        return ""
    import torch

    found = torch.cuda.device_count()
    return "" if found >= NUM_GPUS else f"HYMBA_TEST_DEVICE=cuda needs {NUM_GPUS} GPUs, found {found}"
