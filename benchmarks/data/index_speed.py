"""Time and memory of building packings, and of opening them, for 10 million synthetic documents.

python -m benchmarks.data.index_speed PREFIX PACKING SEQ_LENGTH      prints one JSON object (PREFIX.idx is there)
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hymba_train.data.indexed import HEADER, MAGIC, bin_path, idx_path


def main(prefix: str, packing: str, seq_length: str) -> None:
    from hymba_train.data.indexed import IndexedTokens
    from hymba_train.data.packs import Packs, build_packs
    from hymba_train.data.windows import split_held_out

    before = peak_mb()
    part, _ = split_held_out(IndexedTokens(prefix), 0.0001)
    path = Path(f"{prefix}.{packing}-{seq_length}.pack")
    start, start_cpu = time.perf_counter(), time.process_time()
    facts = build_packs(part, path, packing, int(seq_length))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    peak = peak_mb()
    start = time.perf_counter()
    opened = Packs(part, path, packing, int(seq_length), 0, 2)
    len(opened)
    print(json.dumps({
        "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak, "before_mb": before,
        "file_mb": path.stat().st_size / 1e6, "open_ms": (time.perf_counter() - start) * 1e3,
        "num_sequences": facts["num_sequences"],
        "fill": 1 - facts["num_padding_tokens"] / (facts["num_sequences"] * (facts["seq_length"] + 1)),
    }))  # fmt: skip


def write_index_alone(prefix: Path, lengths: np.ndarray) -> None:
    """A .idx over a .bin that is a hole of the right size: packing never reads a token."""
    with open(bin_path(prefix), "wb") as stream:
        stream.truncate(int(lengths.sum(dtype=np.int64)) * 2)
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    with open(idx_path(prefix), "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, lengths.size, lengths.size + 1))
        stream.write(lengths.tobytes())
        stream.write(np.concatenate([[0], ends[:-1]]).tobytes())
        stream.write(np.arange(lengths.size + 1, dtype=np.int64).tobytes())


def peak_mb() -> float:
    """Most memory that this process has held. Not ru_maxrss: that begins with what the parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def build_times(directory: Path, num_documents: int) -> list[dict]:
    """One row a packing, each built in a process of its own."""
    from hymba_train.bench.loader import web_lengths  # with torch, of whose memory a child must know nothing

    prefix = directory / "synthetic"
    lengths = web_lengths(num_documents)
    write_index_alone(prefix, lengths)
    rows = []
    for packing, seq_length in (("best_fit", 2048), ("best_fit", 8192), ("length_buckets", 8192)):
        command = [sys.executable, "-m", "benchmarks.data.index_speed", str(prefix), packing, str(seq_length)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"packing": packing, "seq_length": seq_length, "num_documents": num_documents, **row})
        print(f"  {packing} {seq_length}: {row['cpu_seconds']:.1f} s CPU, {row['peak_mb']:.0f} MB", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
