"""Two processes at once against one: `hymba data tokenize`, and the bare library, which shows what the machine allows.

Both sides are whole fresh processes, by the clock from their start to the end of the last, and encode the same copies
of all domains. The bare processes read their texts once, encode their share of the copies and write nothing.

python -m benchmarks.data.worker_speed TOKENIZER COPIES FILE.jsonl [FILE.jsonl ...]      what a bare process does
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data.tokenize_speed import texts_of

SIDES = ("bare", "ours")


def encode_copies(tokenizer: Path, copies: int, files: list[Path]) -> None:
    """The library's own call for a batch of documents, on one thread, file by file."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [texts_of(path) for path in files]
    for _ in range(copies):
        for batch in texts:
            for encoding in fast.encode_batch_fast(batch, add_special_tokens=False):
                _ = encoding.ids


def scaling(domains: dict[str, Path], tokenizer: Path, copies: int, repeats: int) -> dict[str, dict[str, float]]:
    """Side -> medians over the repeats of ``rate1``, ``rate2`` (MB of text/s by the clock with one and two processes),
    ``cpu1``, ``cpu2`` (CPU seconds of all processes), ``gain`` (rate2 / rate1) and ``cpu_gain`` (2 x cpu1 / cpu2).

    The four runs of a repeat are back to back, and the gains are medians of ratios inside a repeat.
    """
    files = list(domains.values())
    megabytes = copies * sum(len(text.encode()) for path in files for text in texts_of(path)) / 1e6
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        shards = Path(directory, "in")
        shards.mkdir()
        for number in range(copies):
            for domain, path in domains.items():
                (shards / f"{number:02}-{domain}.jsonl").write_bytes(path.read_bytes())
        for repeat in range(repeats):
            for side in SIDES:
                run = {}
                for count in (1, 2):
                    out = Path(directory, f"out-{repeat}-{count}")
                    commands = _bare(tokenizer, copies, files, count) if side == "bare" else [
                        ["hymba_train", "data", "tokenize", "--input", str(shards), "--output-dir", str(out),
                         "--tokenizer", str(tokenizer / "tokenizer.json"), "--workers", str(count), "--quiet"]
                    ]  # fmt: skip
                    seconds, run[f"cpu{count}"] = _together(commands)
                    run[f"rate{count}"] = megabytes / seconds
                run["gain"], run["cpu_gain"] = run["rate2"] / run["rate1"], 2 * run["cpu1"] / run["cpu2"]
                runs[side].append(run)
                print(f"  {side} { ({key: round(value, 2) for key, value in run.items()}) }", file=sys.stderr)
    return {side: {key: statistics.median(run[key] for run in runs[side]) for key in runs[side][0]} for side in SIDES}


def _bare(tokenizer: Path, copies: int, files: list[Path], count: int) -> list[list[str]]:
    share = str(copies // count)
    return [["benchmarks.data.worker_speed", str(tokenizer), share, *map(str, files)] for _ in range(count)]


def _together(commands: list[list[str]]) -> tuple[float, float]:
    """(seconds by the clock, CPU seconds) of Python modules run at the same time, until the last has ended."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    start, start_cpu = time.perf_counter(), _cpu_seconds()
    running = [
        subprocess.Popen([sys.executable, "-m", *command], env=env, stdout=subprocess.DEVNULL) for command in commands
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"exit codes {codes} of {commands}")
    return time.perf_counter() - start, _cpu_seconds() - start_cpu


def _cpu_seconds() -> float:
    """Of the processes that this one has waited for, and theirs."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


if __name__ == "__main__":
    encode_copies(Path(sys.argv[1]), int(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
