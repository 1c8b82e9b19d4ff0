"""Associative recall can be learnt from a source of it, by attention and by an SSM alone: a minute of training each."""

from __future__ import annotations

import json

import pytest

from data_prep.recall import write_recall
from tests.compare.conftest import compare
from tests.train.tiny_run import write_data

EXPERIMENT = """# @package _global_
# Associative recall alone, from many short documents.
defaults:
  - override /model: hymba_tiny
  - override /precision: float32
  - override /schedule: wsd
  - _self_
run: {name: recall, directory: PATH/runs, device: cpu}
model:
  {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2, num_query_groups: 2, vocab_size: 96,
   global_layers: [], window_size: null, kv_groups: [], num_meta_tokens: 0, mamba_state_dim: 4, mamba_dt_rank: 4,
   make_vocab_size_divisible_by: 16, rope_type: default, init_method_std: 0.1}
optim: {lr: 3.0e-3, min_lr: 1.0e-4}
schedule: {lr_warmup_fraction: 0.05}
data:
  {path: PATH, tokenizer: tokenizer.json, sources: {recall: {path: recall}}, phases: {only: {tokens: 2.4e+6,
   seq_length: 32, global_batch_size: 64, micro_batch_size: 64, blend: {recall: 1}}}}
evaluation:
  recall_symbols: 32
  recall:
    two: {kind: mqar, length: 32, items: 2, num_samples: 128}
    four: {kind: mqar, length: 32, items: 4, num_samples: 128}
checkpoint: {save_interval: 0, async_save: false}
logging: {log_interval: 50, eval_interval: 0, tensorboard: false}
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_associative_recall_can_be_learnt(tmp_path):
    write_data(tmp_path)
    write_recall(tmp_path / "recall", tmp_path / "tokenizer.json", 2_500_000, 32, num_symbols=32, kinds=("mqar",))
    (tmp_path / "recipes" / "experiment").mkdir(parents=True)
    (tmp_path / "recipes" / "experiment" / "study.yaml").write_text(EXPERIMENT.replace("PATH", str(tmp_path)))
    members = ["--member", "attention=model.layer_pattern=[attention]", "--member", "ssm=model.layer_pattern=[ssm]"]
    process = compare(tmp_path, *members, "--jobs", "2")
    out, err = process.communicate(timeout=1700)
    assert process.returncode == 0, out + err
    table = json.loads((tmp_path / "runs" / "study" / "table.json").read_text())
    for member in table["members"]:
        recall = member["runs"][0]["recall"]
        print(member["name"], recall)
        # With any value of the context an answer is right by luck in 1/2 and 1/4 of the cases. Seen: 0.8 and 0.53, by
        # both: so few pairs fit into the state of the SSM as well.
        assert recall["two"] > 0.6 and recall["four"] > 0.35, member["name"]
