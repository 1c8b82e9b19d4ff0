"""Shuffled reading of a source larger than memory may be, in a process that stays small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hymba_train.data.indexed import HEADER, MAGIC, bin_path, idx_path
from tests.data.test_sample_order import write_word_tokenizer

NUM_DOCUMENTS, DOCUMENT_TOKENS, SEQ_LENGTH, VOCAB_SIZE = 1_000_000, 4_000, 64, 100
LIMIT_MB = 80  # the index itself, all of which a run ends up having mapped, has 20

READ = """
import json, random, sys
from pathlib import Path
from hymba_train.data.build import build_training_data
from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig

def peak_mb():  # not ru_maxrss, which begins with that of the parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

directory, seq_length, vocab_size = sys.argv[1], *map(int, sys.argv[2:])
phase = PhaseConfig(tokens=10**12, seq_length=seq_length, global_batch_size=1, blend={"web": 1.0})
config = DataConfig(
    path=directory, tokenizer="tokenizer.json", sources={"web": SourceConfig("web", 0.001)}, phases={"main": phase}
)
before = peak_mb()
opened = build_training_data(config, seed=1, vocab_size=vocab_size)
windows = [opened.sample(0, random.Random(n).randrange(10**11))["window"] for n in range(3000)]
print(json.dumps({"mb": peak_mb() - before, "tokens": opened.sources["web"].training.num_tokens,
                  "spread": [min(windows), max(windows)]}))
"""


@pytest.fixture
def large_source(tmp_path) -> Path:
    """8 GB of tokens that take no room on the disk: .bin is a hole."""
    with open(bin_path(tmp_path / "web"), "wb") as stream:
        stream.truncate(2 * NUM_DOCUMENTS * DOCUMENT_TOKENS)
    with open(idx_path(tmp_path / "web"), "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, NUM_DOCUMENTS, NUM_DOCUMENTS + 1))
        stream.write(np.full(NUM_DOCUMENTS, DOCUMENT_TOKENS, np.int32).tobytes())
        stream.write((np.arange(NUM_DOCUMENTS, dtype=np.int64) * 2 * DOCUMENT_TOKENS).tobytes())
        stream.write(np.arange(NUM_DOCUMENTS + 1, dtype=np.int64).tobytes())
    write_word_tokenizer(tmp_path / "tokenizer.json", VOCAB_SIZE)
    return tmp_path


def test_memory_does_not_grow_with_the_data(large_source):
    """62 million windows: their order as an array of int64 would be 500 MB, the tokens read 8 GB."""
    arguments = [str(large_source), str(SEQ_LENGTH), str(VOCAB_SIZE)]
    done = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["tokens"] > 3.9e9
    num_windows = found["tokens"] // SEQ_LENGTH
    assert found["spread"][0] < 0.01 * num_windows
    assert found["spread"][1] > 0.99 * num_windows
    assert 1 < found["mb"] < LIMIT_MB
