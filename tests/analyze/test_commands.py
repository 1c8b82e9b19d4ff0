"""The commands that need a model, end to end on a trained run and its export."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from hymba_train.cli import main as hymba
from hymba_train.errors import UserError

HEAD = {"analysis", "hymba_train", "settings"}
KEYS = {
    "attention": {"domains", "meta_tokens", "left_out"},
    "importance": {"whole", "without", "mean_change", "layer_0_ssm", "left_out"},
    "kv": {"layers", "keys", "values", "left_out"},
}
PICTURES = {
    "attention": ["mass", "heads", "entropy", "maps", "meta"],
    "importance": [""],
    "kv": ["heads", "layers"],
}


def run(name: str, output: Path, *arguments: object) -> dict:
    assert hymba(["analyze", name, "--output", str(output), "--device", "cpu", *map(str, arguments)]) == 0
    for picture in PICTURES[name]:
        file = output / f"{name}{'_' if picture else ''}{picture}.png"
        assert file.read_bytes().startswith(b"\x89PNG"), file
    found = json.loads((output / f"{name}.json").read_text())
    assert set(found) == HEAD | KEYS[name] and found["analysis"] == name
    return found


@pytest.fixture
def words(trained, tmp_path):
    """A tokenizer that splits at spaces, and a text for it."""
    tokenizer = Tokenizer.from_file(str(trained.export / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "story.txt"
    text.write_text(" ".join(f"w{1 + i * 7 % 90}" for i in range(50)))
    return ["--tokenizer", tmp_path / "tokenizer.json", "--text", text]


@pytest.mark.parametrize("name", list(KEYS))
def test_on_a_run_and_on_its_export(name, trained, tmp_path, capsys):
    """The same weights and text give the same numbers."""
    small = ["--sequences", 2, "--length", 20]
    first = run(name, tmp_path / "run", "--model", trained.run, *small)
    again = run(name, tmp_path / "export", "--model", trained.export, "--data", trained.run, *small)
    assert first["settings"].pop("model") != again["settings"].pop("model")
    assert json.dumps(first) == json.dumps(again)
    assert str(tmp_path / "run" / f"{name}.json") in capsys.readouterr().out


def test_attention_on_text_files(trained, tmp_path, words):
    found = run("attention", tmp_path / "out", "--model", trained.export, *words, "--length", 16, "--layers", "1,2")
    assert found["settings"]["sequences"] == {"story": [16, 16]} and found["settings"]["map_layers"] == [1, 2]
    part = found["domains"]["story"]["attention"]
    for layer in range(4):
        for head in range(4):
            assert sum(part["mass"][name][layer][head] for name in part["mass"]) == pytest.approx(1, abs=1e-5)
    assert len(found["meta_tokens"]["ssm"]["mass"][0]) == 4 and found["left_out"] == {}


def test_documents_that_were_trained_apart_are_looked_at_apart(trained, tmp_path):
    found = run("kv", tmp_path, "--model", trained.masked, "--sequences", 3, "--max-tokens", 24)
    assert found["settings"]["domains"] == ["odd", "even"] and found["settings"]["num_tokens"] <= 24
    assert found["left_out"] == {"2": "takes the keys and values of layer 1"}


def test_no_sequence_goes_on_into_another_document(trained):
    from hymba_train.analyze.texts import read_texts
    from hymba_train.convert.load import load_model

    settings = argparse.Namespace(text=None, data=None, data_path=None, sequences=100, length=100)
    apart, whole = (read_texts(load_model(run), settings) for run in (trained.masked, trained.run))
    ends = [[bool((s[:-1] == 0).any()) for rows in texts.values() for s in rows] for texts in (apart, whole)]
    assert {len(s) for rows in whole.values() for s in rows} == {32}
    assert not any(ends[0]) and any(ends[1])


def test_importance_names_layer_0(trained, tmp_path, capsys):
    found = run("importance", tmp_path, "--model", trained.run, "--sequences", 2)
    assert len(found["without"]) == 8 and set(found["whole"]) == {"loss/odd", "loss/even"}
    assert found["layer_0_ssm"]["loss/odd"]["of"] == 8
    assert "without the SSM branch of layer 0: loss/odd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "hymba analyze nonsense: no such analysis"),
        (["attention", "--model", "RUN"], "the following arguments are required: --output"),
        (["attention", "--model", "RUN", "--heads", "7"], "--heads 7: the heads are 0..3"),
        (["attention", "--model", "RUN", "--layers", "9"], "--layers 9: the layers are 0..3"),
        (["attention", "--model", "RUN", "--length", "0"], "--length 0: give at least 1"),
        (["attention", "--model", "EXPORT"], "--data: an exported directory has no text"),
        (["kv", "--model", "RUN", "--text", "missing.txt"], "--text missing.txt: cannot be read"),
        (["kv", "--model", "RUN", "--text", "TEXT"], "holds 1 tokens"),
        (["kv", "--model", "RUN", "--text", "TEXT", "--data", "RUN"], "--text: is given instead of --data"),
        (["importance", "--model", "nowhere"], "nowhere: neither a complete step directory"),
        (["importance", "--model", "RUN", "--batch-size", "0"], "--batch-size 0: give at least 1"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(trained, tmp_path, capsys, arguments, message):
    places = {"RUN": str(trained.run), "EXPORT": str(trained.export), "TEXT": str(trained.text)}
    output = [] if "required" in message else ["--output", str(tmp_path)]
    assert hymba(["analyze", *(places.get(word, word) for word in arguments), *output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("hymba: error: ")


def test_tasks_need_the_harness(trained, tmp_path, monkeypatch):
    import importlib.util

    from hymba_train.analyze.importance import main

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(UserError, match="lm-evaluation-harness is not installed"):
        main(["--model", str(trained.run), "--output", str(tmp_path), "--device", "cpu", "--tasks", "piqa"])


def test_importance_on_recall_tasks(trained, tmp_path, monkeypatch):
    from hymba_train.analyze.importance import main as importance
    from hymba_train.config import compose
    from hymba_train.evaluation import recall_trial

    with pytest.raises(UserError, match="ordinary"):  # the tiny vocabulary has not that many symbols
        importance(["--model", str(trained.run), "--output", str(tmp_path), "--recall", "recall_512"])
    tasks = ["evaluation.recall={pairs:{kind:mqar,length:24,items:4,num_samples:6}}", "evaluation.recall_symbols=16"]
    monkeypatch.setattr(recall_trial, "compose", lambda overrides: compose(["model=hymba_1p5b", *tasks]))
    found = run("importance", tmp_path, "--model", trained.run, "--recall", "mine", "--sequences", 1)
    assert set(found["whole"]) == {"loss/odd", "loss/even", "pairs"} and 0 <= found["whole"]["pairs"] <= 1
    tasks.append("evaluation.recall.pairs.items=12")  # refused as `hymba eval` and a plan refuse it
    with pytest.raises(UserError, match=r"evaluation\.recall\.pairs\.items=12 need 49 tokens, length is 24"):
        importance(["--model", str(trained.run), "--output", str(tmp_path), "--recall", "mine"])


def test_help_names_every_analysis(capsys):
    assert hymba(["analyze"]) == 2 and hymba(["analyze", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*KEYS, "cache", "throughput"))
