"""Import and export of a randomly initialised Hymba-1.5B: time and peak memory of each, in processes of their own.

python -m benchmarks.convert_1p5b [DIRECTORY]     prints a table; needs 16 GB of disk in DIRECTORY (default: temporary)
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_RUN = """
import resource, sys
from hymba_train.convert.cli import run_convert
run_convert(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_random_model(directory: Path) -> int:
    """The published names, shapes and configuration with random bfloat16 weights. Returns the bytes of the weights."""
    import torch

    from hymba_train.config import compose
    from hymba_train.convert.hf_config import TokenIds, hf_config
    from hymba_train.convert.names import hf_parts
    from hymba_train.convert.shards import PlannedTensor, write_shards
    from hymba_train.describe import model_tensors

    model = compose(["model=hymba_1p5b"]).model
    tensors = [PlannedTensor(n, s, torch.bfloat16) for t in model_tensors(model) for n, s in hf_parts(t)]
    shapes = {t.name: t.shape for t in tensors}
    write_shards(directory, tensors, lambda name: torch.randn(shapes[name]) * 0.02, 5 * 10**9)
    (directory / "config.json").write_text(json.dumps(hf_config(model, "bfloat16", TokenIds())))
    return sum(t.num_bytes for t in tensors)


def measure(*arguments: str) -> tuple[float, float]:
    """(seconds, peak resident GB) of one hymba convert."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("peak"))
    return time.monotonic() - start, int(peak) * 1024 / 1e9


def read_header(path: Path) -> dict[str, Any]:
    """Tensor -> type, shape and place of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return header


def main() -> None:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        directory = Path(name)
        (directory / "model").mkdir()
        num_bytes = write_random_model(directory / "model")
        rows = [("from-hf", measure("from-hf", "--model", f"{name}/model", "--output", f"{name}/run"))]
        for dtype in ("bfloat16", "float32"):
            output = f"{name}/{dtype}"
            found = measure("to-hf", "--checkpoint", f"{name}/run", "--output", output, "--dtype", dtype)
            rows.append((f"to-hf --dtype {dtype}", found))
        names = [directory / kind / "model.safetensors" for kind in ("model", "bfloat16")]
        same = filecmp.cmp(*names, shallow=False)
        num_tensors = len(read_header(names[1]))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread, load {load:.1f} at the start "
        f"and {os.getloadavg()[0]:.1f} at the end; {num_tensors} tensors, {num_bytes / 1e9:.2f} GB in bfloat16"
    )
    print("| command | seconds | peak memory, GB |\n|---|---|---|")
    for command, (seconds, peak) in rows:
        print(f"| {command} | {seconds:.0f} | {peak:.2f} |")
    print(f"weights imported and exported again are {'byte for byte' if same else 'NOT'} those of the original")


if __name__ == "__main__":
    main()
