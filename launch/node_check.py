"""Is this node fit to train? Run on every node before training starts; only the standard library.

Writes one line, "ok CLOCK" or "bad CLOCK REASON", into the file --result; CLOCK is this node's time in seconds.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

MAX_USED_MEMORY_MIB = 2048  # of a GPU before we start: more belongs to another process
TEST_BYTES = 4 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Check this node and write the result. Returns 0, or 1 if the node is bad."""
    parser = argparse.ArgumentParser(prog="python -m launch.node_check", description=__doc__)
    parser.add_argument("--result", required=True, type=Path, help="file to write, in a directory that all nodes see")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must be there")
    parser.add_argument("--min-free-disk-gib", type=float, default=0.0)
    parser.add_argument("--min-free-memory-gib", type=float, default=0.0)
    parser.add_argument("--command", help="further check: a shell command that must succeed")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for --command")
    args = parser.parse_args(argv)
    problems = [
        *check_gpus(args.gpus),
        *check_disk(args.result.parent, args.min_free_disk_gib),
        *check_disk(Path(os.environ.get("TMPDIR", "/tmp")), 0.0),
        *check_memory(args.min_free_memory_gib),
        *(check_command(args.command, args.timeout) if args.command else []),
    ]
    clock = int(time.time())
    text = f"bad {clock} {'; '.join(problems)}" if problems else f"ok {clock}"
    temporary = args.result.with_name(f".{args.result.name}.{os.getpid()}")
    temporary.write_text(" ".join(text.split()) + "\n", encoding="utf-8")
    os.replace(temporary, args.result)
    print(text)
    return 1 if problems else 0


def check_gpus(expected: int) -> list[str]:
    """``expected`` GPUs answer, nobody else uses them, and they report no memory errors."""
    if not expected:
        return []
    fields = "index,memory.used,ecc.errors.uncorrected.volatile.total"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [f"{expected} GPUs expected, but there is no nvidia-smi"]
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer within 60 s"]
    if done.returncode:
        return [f"nvidia-smi exits with {done.returncode}: {_last_line(done.stdout + done.stderr)}"]
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if all(part.isdigit() for part in visible):  # on a shared node the others are not ours
        rows = [row for row in rows if row[0] in visible]
    problems = []
    if len(rows) < expected:
        problems.append(f"{expected} GPUs expected, nvidia-smi shows {len(rows)}")
    for index, used, errors in (row for row in rows if len(row) == 3):
        if used.isdigit() and int(used) > MAX_USED_MEMORY_MIB:
            problems.append(f"GPU {index}: {used} MiB in use by another process")
        if errors.isdigit() and int(errors):
            problems.append(f"GPU {index}: {errors} uncorrectable memory errors")
    return problems


def check_disk(directory: Path, min_free_gib: float) -> list[str]:
    """``directory`` takes a file, gives it back unchanged, and has room."""
    try:
        free = shutil.disk_usage(directory).free / 2**30
        if free < min_free_gib:
            return [f"{directory}: {free:.1f} GiB free, {min_free_gib:g} wanted"]
        content = secrets.token_bytes(TEST_BYTES)
        path = directory / f".node_check.{secrets.token_hex(8)}"
        try:
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if path.read_bytes() != content:
                return [f"{directory}: a file comes back changed"]
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return [f"{directory}: cannot be written ({error.strerror or error})"]
    return []


def check_memory(min_free_gib: float, meminfo: Path = Path("/proc/meminfo")) -> list[str]:
    """Enough main memory is free."""
    values = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    free = int(values["MemAvailable"].split()[0]) / 2**20
    return [] if free >= min_free_gib else [f"{free:.1f} GiB of memory free, {min_free_gib:g} wanted"]


def check_command(command: str, timeout_seconds: float) -> list[str]:
    """A command of the site succeeds."""
    try:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return [f"{command!r} does not end within {timeout_seconds:g} s"]
    if done.returncode:
        return [f"{command!r} exits with {done.returncode}: {_last_line(done.stdout + done.stderr)}"]
    return []


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


if __name__ == "__main__":
    raise SystemExit(main())
