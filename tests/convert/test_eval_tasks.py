"""lm-evaluation-harness on our models, with a task and data of our own, offline."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from hymba_train.convert.cli import run_generate
from hymba_train.convert.to_hf import export_hf
from hymba_train.errors import UserError
from hymba_train.evaluation.cli import run_eval
from hymba_train.evaluation.harness import parse_tasks

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

CONTINUE = """
task: go_on
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["w96"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_without_the_harness_it_is_said_how_to_get_it(runs, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(UserError, match=r"pip install 'hymba-train\[eval\]'"):
        run_eval(["--model", str(runs.path("whole")), "--tasks", "paper", "--device", "cpu"])


@pytest.fixture
def export(runs, tmp_path, monkeypatch):
    """An export whose tokenizer splits at spaces, as the harness joins words by them; no network."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra 'eval')")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = export_hf(runs.path("whole"), tmp_path / "export")
    words = Tokenizer.from_file(str(directory / "tokenizer.json"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(directory / "tokenizer.json"))
    (tmp_path / "tasks").mkdir()
    return directory


def write_task(tmp_path, name, task, documents):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(data=tmp_path / f"{name}.jsonl"))


def test_tasks_on_the_disk(export, tmp_path, capsys):
    """One by likelihood and one by generation (as squad_completion), in batches padded on the left.

    Choices that are one and the same have one likelihood: argmax takes the first, which is right in 3 of 4. Answers are
    what hymba generate says, but for one that is spoiled.
    """
    documents = [{"question": f"w{i} w2 w3", "choices": ["w7", "w7"], "answer": int(i == 1)} for i in range(1, 5)]
    write_task(tmp_path, "which_word", TASK, documents)
    prompts = ["w5", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12", "w3 w3 w3"]
    model = ["--model", str(export), "--device", "cpu", "--json"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    run_generate([*model, *asked, "--max-new-tokens", "4"])
    lines = capsys.readouterr().out.splitlines()
    answers = [json.loads(line)["completion"].strip() for line in lines]
    assert all(len(answer.split()) == 4 for answer in answers)
    documents = [{"question": q, "answer": a} for q, a in zip(prompts, [*answers[:2], "w1"], strict=True)]
    write_task(tmp_path, "go_on", CONTINUE, documents)
    common = [*model, "--include-path", str(tmp_path / "tasks")]
    assert run_eval([*common, "--tasks", "which_word:1,go_on"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["which_word"]["acc"] == 0.75
    assert found["go_on"]["exact_match"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="no task 'which_wort'"):
        run_eval([*common, "--tasks", "which_wort"])


def test_data_that_cannot_be_had_is_one_line(export, tmp_path):
    write_task(tmp_path, "which_word", TASK, [])
    (tmp_path / "which_word.jsonl").unlink()
    with pytest.raises(UserError, match="data of which_word cannot be had") as error:
        run_eval(["--model", str(export), "--include-path", str(tmp_path / "tasks"), "--tasks", "which_word"])
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)


def test_the_harness_has_the_tasks_of_the_paper():
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed (extra 'eval')")
    assert set(parse_tasks("paper")) <= set(tasks.TaskManager().all_tasks)


def test_a_harness_without_its_backend_is_said(runs, monkeypatch):
    """lm-eval installs without accelerate."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra 'eval')")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match=r"lacks a package .*pip install 'hymba-train\[eval\]'"):
        run_eval(["--model", str(runs.path("whole")), "--tasks", "piqa", "--device", "cpu"])
