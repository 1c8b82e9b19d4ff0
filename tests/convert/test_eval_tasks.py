"""lm-evaluation-harness on our models, with a task and data of our own, offline."""

from __future__ import annotations

import importlib.util
import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from hymba_train.convert.cli import run_eval
from hymba_train.convert.to_hf import export_hf
from hymba_train.errors import UserError

pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")

TASK = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_without_the_harness_it_is_said_how_to_get_it(runs, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(UserError, match=r"pip install 'hymba-train\[eval\]'"):
        run_eval(["--model", str(runs.path("whole")), "--tasks", "paper", "--device", "cpu"])


def test_a_task_on_the_disk(runs, tmp_path, capsys, monkeypatch):
    """Choices that are one and the same have one likelihood: argmax takes the first, which is right in 3 of 4."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra 'eval')")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    export = export_hf(runs.path("whole"), tmp_path / "export")
    words = Tokenizer.from_file(str(export / "tokenizer.json"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(export / "tokenizer.json"))
    documents = [{"question": f"w{i} w2 w3", "choices": ["w7", "w7"], "answer": int(i == 1)} for i in range(1, 5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "which_word.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    common = ["--model", str(export), "--include-path", str(tmp_path / "tasks"), "--device", "cpu", "--json"]
    assert run_eval([*common, "--tasks", "which_word:1"]) == 0
    assert json.loads(capsys.readouterr().out)["which_word"]["acc"] == 0.75
    with pytest.raises(UserError, match="no task 'which_wort'"):
        run_eval([*common, "--tasks", "which_wort"])
