"""``hymba bench loader``: samples a second of one loader thread, and how long a training step waits for it. On a CPU.

The step is a sleep of the time that a GPU takes, which leaves this process's CPU to the loader as a GPU does. What the
step finds ready costs nothing; what it waits for is exposed. For the worst case it is also a loop in pure Python, which
has to share the interpreter with the loader's thread. Synthetic tokens, document lengths as on the web.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from hymba_train.data.batches import micro_batches
from hymba_train.data.build import build_training_data, load_tokenizer, open_source, pack_location
from hymba_train.data.indexed_writer import IndexedWriter
from hymba_train.data.packs import build_packs
from hymba_train.data.prefetch import Prefetcher

VOCAB_SIZE = 32001
CASES = (("concat", 2048), ("best_fit", 2048), ("concat", 8192), ("length_buckets", 8192))
BATCH_TOKENS = 16_384
"""Tokens of a rank's step: 8 sequences of 2,048, as in `hymba bench step`."""


def rates(directory: Path, num_documents: int, step_seconds: float) -> list[dict]:
    """One row a packing and sequence length."""
    torch.set_num_threads(1)
    write_source(directory / "loader", num_documents)
    _write_tokenizer(directory / "tokenizer.json")
    rows = []
    for packing, seq_length in CASES:
        batch = BATCH_TOKENS // seq_length
        phase = PhaseConfig(
            tokens=10**12, seq_length=seq_length, global_batch_size=batch, blend={"web": 1.0}, packing=packing
        )
        config = DataConfig(
            tokenizer="tokenizer.json", path=str(directory), phases={"main": phase},
            sources={"web": SourceConfig("loader")},
        )  # fmt: skip
        if packing != "concat":
            source = open_source(config, "web", config.sources["web"], load_tokenizer(config))
            build_packs(source.training, pack_location(config, phase, source), packing, seq_length)
        opened = build_training_data(config, seed=1, vocab_size=VOCAB_SIZE)
        row = {"packing": packing, "seq_length": seq_length, "batch": batch}
        row |= _rate(opened, batch) | _exposed(opened, batch, step_seconds) | _slower(opened, batch, step_seconds)
        row["source_mb"] = (directory / "loader.bin").stat().st_size / 1e6
        rows.append(row)
        print("  " + json.dumps(row), file=sys.stderr)
    return rows


def _rate(opened, batch: int, num_steps: int = 400) -> dict:
    def load(step: int) -> None:
        micro_batches(opened, 0, step * batch, global_batch_size=batch, micro_batch_size=batch)

    for step in range(20):
        load(step)
    start = time.process_time()
    for step in range(20, 20 + num_steps):
        load(step)
    seconds = time.process_time() - start
    samples, tokens = num_steps * batch, num_steps * BATCH_TOKENS
    return {"samples_per_cpu_second": samples / seconds, "tokens_per_cpu_second": tokens / seconds}


def _batches(opened, batch: int, num_steps: int):
    return (
        micro_batches(opened, 0, step * batch, global_batch_size=batch, micro_batch_size=batch)
        for step in range(num_steps)
    )


def _slower(opened, batch: int, step_seconds: float, num_steps: int = 6, rounds: int = 5) -> dict:
    """How much longer steps in pure Python take with a loader beside them than without: median of rounds."""

    def work(count: int) -> int:
        total = 0
        for i in range(count):
            total += i
        return total

    start = time.perf_counter()
    work(10**6)
    count = int(10**6 * step_seconds / (time.perf_counter() - start))

    def steps(items) -> float:
        iterator = iter(items)
        for _ in range(3):  # the first are waited for by every loader
            next(iterator)
        start = time.perf_counter()
        for _ in range(num_steps):
            next(iterator)
            work(count)
        return time.perf_counter() - start

    ratios = []
    for _ in range(rounds):
        alone = steps([None] * (num_steps + 3))
        with Prefetcher(_batches(opened, batch, num_steps + 5)) as prefetcher:
            ratios.append(steps(prefetcher) / alone)
    return {"slower_share": statistics.median(ratios) - 1}


def _exposed(opened, batch: int, step_seconds: float, num_steps: int = 60) -> dict:
    waited = []
    with Prefetcher(_batches(opened, batch, num_steps)) as prefetcher:
        for _ in range(num_steps):
            start = time.perf_counter()
            next(prefetcher)
            waited.append(time.perf_counter() - start)
            time.sleep(step_seconds)
    waited = waited[5:]  # the first batches are waited for by every loader
    return {"exposed_share": sum(waited) / (len(waited) * step_seconds), "step_ms": step_seconds * 1e3}


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB_SIZE)}}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(path))


def web_lengths(num_documents: int, seed: int = 0) -> np.ndarray:
    """Tokens of each document, int32: log-normal, median 545, mean about 1,000, as in web corpora."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(6.3, 1.1, num_documents), 2, 200_000).astype(np.int32)


def write_source(prefix: Path, num_documents: int) -> None:
    """A whole source of random tokens."""
    rng = np.random.default_rng(1)
    with IndexedWriter(prefix, np.uint16) as writer:
        for begin in range(0, num_documents, 10_000):
            lengths = web_lengths(min(10_000, num_documents - begin), begin)
            tokens = rng.integers(3, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
            tokens[np.cumsum(lengths) - 1] = 2
            writer.add_documents(tokens, lengths)
        writer.publish()


def table(rows: Sequence[dict]) -> list[str]:
    """Markdown."""
    lines = [
        "| packing | sequence | samples/s a core | M tokens/s a core | exposed | in pure Python |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['packing']} | {row['seq_length']} | {row['samples_per_cpu_second']:,.0f} | "
            f"{row['tokens_per_cpu_second'] / 1e6:.1f} | {row['exposed_share']:.2%} | {row['slower_share']:.2%} |"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hymba bench loader", description=__doc__)
    parser.add_argument("--documents", type=int, default=200_000, help="of the source, some 1,000 tokens each")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of the training step that is simulated")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        rows = rates(Path(scratch), args.documents, args.step_ms / 1e3)
    print(*table(rows), sep="\n")
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0
