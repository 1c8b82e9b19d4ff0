"""Training speed of the demo model on this machine's CPU: one process, two tensor-parallel, two data-parallel.

python -m benchmarks.cpu_demo [STEPS]       prints a table, one row a layout
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LAYOUTS = {
    "1 process": (1, ["parallel=single"]),
    "TP=2": (2, ["parallel=tp2"]),
    "DP=2, distributed optimizer": (2, ["parallel=dp"]),
}
WARM_UP_STEPS = 5


def measure(overrides: list[str], processes: int, num_steps: int, directory: str) -> tuple[float, float]:
    """(tokens/s in the median step, seconds from the command to its end)."""
    import time

    command = [
        sys.executable, "-m", "hymba_train", "train", "experiment=demo", *overrides, f"run.directory={directory}",
        f"run.name=p{processes}{overrides[0][9:]}", f"run.train_steps={num_steps}", "logging.log_interval=1",
        "checkpoint.enabled=false", "logging.tensorboard=false",
    ]  # fmt: skip
    if processes > 1:
        command += ["--nproc", str(processes)]
    started = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    lines = (Path(directory) / command[7].removeprefix("run.name=") / "metrics.jsonl").read_text().splitlines()
    rates = [r["tokens_per_second"] for r in map(json.loads, lines) if r["event"] == "train"]
    return statistics.median(rates[WARM_UP_STEPS:]), seconds


def main(num_steps: int) -> None:
    import torch

    if not Path("build/demo-data").is_dir():
        prepare = ["data", "prepare-demo", "--output", "build/demo-data"]
        subprocess.run([sys.executable, "-m", "hymba_train", *prepare], check=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"load {os.getloadavg()[0]:.1f} at the start, {num_steps} steps, one thread a process\n")  # fmt: skip
    print("| layout | tokens/s (median step) | command, seconds |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        for name, (processes, overrides) in LAYOUTS.items():
            rate, seconds = measure(overrides, processes, num_steps, directory)
            print(f"| {name} | {rate:,.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
