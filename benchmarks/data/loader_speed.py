"""Samples a second of one loader thread, and how long a training step waits for it.

The step is a sleep of the time that a GPU takes, which leaves this process's CPU to the loader as a GPU does. What the
step finds ready costs nothing; what it waits for is exposed. For the worst case it is also a loop in pure Python, which
has to share the interpreter with the loader's thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.data.synthetic import VOCAB_SIZE, write_source

CASES = (("concat", 2048), ("best_fit", 2048), ("concat", 8192), ("length_buckets", 8192))
BATCH_TOKENS = 16_384
"""Tokens of a rank's step: 8 sequences of 2,048, as in `hymba bench step`."""


def rates(directory: Path, num_documents: int, step_seconds: float) -> list[dict]:
    """One row a packing and sequence length."""
    import torch

    from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
    from hymba_train.data.build import build_training_data, load_tokenizer, open_source, pack_location
    from hymba_train.data.packs import build_packs

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
    from hymba_train.data.batches import micro_batches

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
    from hymba_train.data.batches import micro_batches

    return (
        micro_batches(opened, 0, step * batch, global_batch_size=batch, micro_batch_size=batch)
        for step in range(num_steps)
    )


def _slower(opened, batch: int, step_seconds: float, num_steps: int = 6, rounds: int = 5) -> dict:
    """How much longer steps in pure Python take with a loader beside them than without: median of rounds."""
    from hymba_train.data.prefetch import Prefetcher

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
    from hymba_train.data.prefetch import Prefetcher

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
