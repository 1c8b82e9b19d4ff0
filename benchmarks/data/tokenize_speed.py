"""Tokenising speed: our whole path from file to published pair against the bare library on texts in memory.

One measurement is one fresh process (no library has seen the text before), so a library's cache of words starts cold
on both sides. Loading the tokenizer and a first call on some short texts, which builds tables in some libraries and
loads modules in ours, are counted on neither side: a shard of a real corpus is a thousand times longer.

python -m benchmarks.data.tokenize_speed bare|ours BACKEND FILE.jsonl TOKENIZER      prints one JSON object
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hymba_train.data.tokenizer import SAMPLE_TEXTS

WARM_UP = list(SAMPLE_TEXTS)  # which our loading encodes to compare libraries
BACKENDS = {
    "tokenizers": ("tokenizer.json", "default"),
    "sentencepiece": ("tokenizer.model", "default"),
    "gigatoken": ("tokenizer.json", "gigatoken"),
}
"""Library -> (file of the tokenizer's directory, --backend)."""
MORE_REPEATS = {"gigatoken": 4}
"""Its runs are so short that the noise in them is larger."""


def texts_of(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def warm_up(act: Callable[[], Any]) -> None:
    for _ in range(5):
        act()


def bare(library: str, path: Path, tokenizer: Path) -> Callable[[], Any]:
    """The library's own fastest call for a batch of documents on one thread."""
    texts = texts_of(path)
    if library == "tokenizers":
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        warm_up(lambda: fast.encode_batch_fast(WARM_UP))
        return lambda: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]
    if library == "sentencepiece":
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        warm_up(lambda: processor.encode(WARM_UP))
        return lambda: processor.encode(texts, num_threads=1)
    from hymba_train.data.tokenizer_backends import GigaToken

    # From the same tokenizer.json, special tokens taken out: from the .model it is slower, and would flatter us.
    giga = GigaToken((tokenizer / "tokenizer.json").read_bytes(), is_sentencepiece=False)._fast
    warm_up(lambda: giga.encode_batch(WARM_UP, parallel=False))
    return lambda: giga.encode_batch(texts, parallel=False)


def ours(library: str, path: Path, tokenizer: Path, out: Path) -> Callable[[], Any]:
    """What a worker does with a shard: hash, read, parse, encode, check, write, fsync, publish."""
    from data_prep.inputs import find_inputs
    from data_prep.tokenize_shard import ChunkTokenizer, Settings, tokenize_shard

    name, backend = BACKENDS[library]
    worker = ChunkTokenizer(Settings(str(tokenizer / name), backend=backend))
    (out / "first.jsonl").write_text(json.dumps({"text": "one line"}))
    first, file = (find_inputs([path])[0] for path in (out / "first.jsonl", path))
    warm_up(lambda: worker.tokenizer.encode_documents(WARM_UP, worker.dtype, True))
    tokenize_shard(first, out / "first", worker.settings, worker.tokenizer, worker.map)
    return lambda: tokenize_shard(file, out / "out", worker.settings, worker.tokenizer, worker.map)


def main(what: str, library: str, path: str, tokenizer: str) -> None:
    text_bytes = sum(len(text.encode()) for text in texts_of(Path(path)))
    with tempfile.TemporaryDirectory() as out:
        make = (Path(path), Path(tokenizer))
        act = bare(library, *make) if what == "bare" else ours(library, *make, Path(out))
        start_cpu, start = time.process_time(), time.perf_counter()
        act()
        cpu, wall = time.process_time() - start_cpu, time.perf_counter() - start
    print(json.dumps({"text_bytes": text_bytes, "cpu_seconds": cpu, "wall_seconds": wall}))


def measure(what: str, library: str, path: Path, tokenizer: Path) -> float:
    """MB of text per CPU second, in a fresh process."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.data.tokenize_speed", what, library, str(path), str(tokenizer)]
    found = json.loads(subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout)
    return found["text_bytes"] / 1e6 / found["cpu_seconds"]


def speeds(texts: dict[str, tuple[Path, int]], tokenizer: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Library -> name of a text -> {"bare": MB/s, "ours": MB/s, "share": ours / bare}: medians over the repeats.

    The two sides are measured in turn, and ``share`` is the median of the ratios of such pairs: what else the machine
    does touches both.

    Args:
        texts: name -> (file, repeats).
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for library in BACKENDS:
        for domain, (path, repeats) in texts.items():
            runs = [(measure("bare", library, path, tokenizer), measure("ours", library, path, tokenizer))
                    for _ in range(repeats + MORE_REPEATS.get(library, 0))]  # fmt: skip
            table.setdefault(library, {})[domain] = {
                "bare": statistics.median(run[0] for run in runs),
                "ours": statistics.median(run[1] for run in runs),
                "share": statistics.median(run[1] / run[0] for run in runs),
            }
            print(f"  {library:14s} {domain:10s} bare {table[library][domain]['bare']:6.2f}, "
                  f"ours {table[library][domain]['ours']:6.2f} MB/s a CPU second", file=sys.stderr)  # fmt: skip
    return table


if __name__ == "__main__":
    main(*sys.argv[1:])
