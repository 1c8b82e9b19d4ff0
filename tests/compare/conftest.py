"""A comparison small enough for a test: text and a recall source of 96 tokens, models of two layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.recall import write_recall
from tests.train.test_training import ROOT
from tests.train.tiny_run import write_data

EXPERIMENT = """# @package _global_
# Small enough for a test.
defaults:
  - override /model: hymba_tiny
  - override /precision: float32
  - override /schedule: cosine
  - _self_
run: {name: "study_${model.name}", directory: PATH/runs, device: cpu}
model:
  {num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 2, vocab_size: 96,
   global_layers: [0], kv_groups: [], window_size: 8, num_meta_tokens: 4, mamba_state_dim: 4, mamba_dt_rank: 4,
   make_vocab_size_divisible_by: 16}
data:
  path: PATH
  tokenizer: tokenizer.json
  validation_sequences: 4
  sources: {odd: {path: odd, validation_fraction: 0.1}, recall: {path: recall}}
  phases:
    only:
      {tokens: 4096, seq_length: 64, global_batch_size: 4, micro_batch_size: 4, blend: {odd: 0.5, recall: 0.5}}
evaluation:
  recall_symbols: 64
  recall: {pairs: {kind: mqar, length: 64, items: 6, num_samples: 4}}
checkpoint: {save_interval: 0, async_save: false, keep_last: 1}
logging: {log_interval: 1, eval_interval: 0, tensorboard: false}
"""


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory) -> Path:
    """Holds data, recipes/experiment/study.yaml and runs."""
    path = tmp_path_factory.mktemp("compare")
    write_data(path)
    write_recall(path / "recall", path / "tokenizer.json", 20_000, 64, num_symbols=64)
    (path / "recipes" / "experiment").mkdir(parents=True)
    (path / "recipes" / "experiment" / "study.yaml").write_text(EXPERIMENT.replace("PATH", str(path)))
    return path


def arguments(path: Path, *more: str) -> list[str]:
    return ["custom", "experiment=study", "--config-dir", str(path / "recipes"), "--any-size", *more]


def compare(path: Path, *more: str) -> subprocess.Popen:
    """The verb in a process of its own."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {k: v for k, v in os.environ.items() if k not in launcher} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hymba_train", "compare", *arguments(path, *more)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
