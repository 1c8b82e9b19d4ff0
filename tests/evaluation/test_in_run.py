"""Recall tasks during training: logged when they should be, the same under every layout and for the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hymba_train.callbacks.jsonl import read_events
from hymba_train.config import compose
from hymba_train.config.schema import RecallTaskConfig
from hymba_train.errors import UserError
from hymba_train.plan import make_plan
from hymba_train.plan.recall import items_of
from tests.train.test_training import run, start
from tests.train.tiny_run import write_data
from tests.warm import server

TASKS = {
    "copy": {"kind": "selective_copy", "length": 30, "items": 5, "num_samples": 6},
    "pairs": {"kind": "mqar", "length": 49, "items": 8, "num_samples": 5},
    "needle": {"kind": "needle", "length": 64, "items": 2, "num_samples": 11},
}
SETTINGS = [
    f"evaluation.recall={json.dumps(TASKS, separators=(',', ':'))}", "evaluation.recall_symbols=64",
    "evaluation.recall_interval=4", "run.train_steps=6", "logging.eval_interval=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recall")
    write_data(path)
    start(path, run("single", *SETTINGS), run("one_phase", *SETTINGS, "run.train_steps=1", "data.document_mask=true"))
    return path


def logged(directory: Path, name: str) -> dict[int, dict]:
    return {r["step"]: r["tasks"] for r in read_events(directory / "runs" / name / "metrics.jsonl", "recall")}


def test_by_interval_and_at_the_end(directory):
    found = logged(directory, "single")
    assert list(found) == [4, 6]
    for tasks in found.values():
        assert list(tasks) == list(TASKS)
        assert [t["answers"] for t in tasks.values()] == [30, 40, 11]
        assert all(0 <= t["accuracy"] <= 1 and 2 < t["loss"] < 6 for t in tasks.values())
        assert len(tasks["needle"]["by_depth"]) == 10
    assert found[4]["copy"]["loss"] != found[6]["copy"]["loss"], "the model has changed, the tasks have not"
    assert list(logged(directory, "one_phase")) == [1]


def test_eval_of_checkpoint_and_export_finds_what_training_logged(directory, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
    from hymba_train.convert.to_hf import export_hf
    from hymba_train.evaluation.cli import run_eval

    path = directory / "runs" / "single"
    expected = logged(directory, "single")[6]
    exported = export_hf(path, tmp_path / "export")
    for arguments in ([str(path)], [str(exported), "--data", str(path), "--batch-size", "2"]):
        assert run_eval(["--model", *arguments, "--recall", "--json", "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)
        for name, task in expected.items():
            assert found[name]["accuracy"] == task["accuracy"] and found[name]["answers"] == task["answers"]
            assert found[name]["loss"] == pytest.approx(task["loss"], abs=1e-5)
            assert found[name].get("by_depth") == task.get("by_depth")
    with pytest.raises(UserError, match="recall_symbols=256"):  # a tokenizer of 96 tokens is too small for the recipe
        run_eval(["--model", str(path), "--recall", "recall_512", "--device", "cpu"])
    with pytest.raises(UserError, match="one at a time"):
        run_eval(["--model", str(path), "--recall", "--tasks", "piqa"])


@pytest.mark.distributed
def test_layouts_find_the_same(directory):
    """Through the whole loop: callback, micro-batches, phases (tests/distributed holds all layouts to one process)."""
    first = "evaluation.recall_interval=1"
    wanted = [
        run("tp2", *SETTINGS, first, "run.train_steps=1", "parallel.tensor=2"),
        run("pp2", *SETTINGS, first, "run.train_steps=1", "parallel.pipeline=2"),
        run("dp2", *SETTINGS, first, "run.train_steps=1"),
    ]
    start(directory, run("first", *SETTINGS, first, "run.train_steps=1"))
    arguments = " then ".join(" ".join(r) for r in wanted).split(" ")
    server().run(2, "tests.train.tiny_run", str(directory), *arguments, timeout_seconds=280)
    expected = logged(directory, "first")[1]
    for name in ("tp2", "pp2", "dp2"):
        for task, found in logged(directory, name)[1].items():
            assert found["accuracy"] == expected[task]["accuracy"] and found["answers"] == expected[task]["answers"]
            assert found["loss"] == pytest.approx(expected[task]["loss"], rel=1e-5), (name, task)


@pytest.mark.parametrize(
    "override, problem",
    [
        ("evaluation.recall.a={kind:mqar,length:64,items:16}", "items=16 need 65 tokens, length is 64: .* at most 15"),
        ("evaluation.recall.a={kind:needle,length:20}", "too short for needle: give at least 34"),
        ("evaluation.recall.a={kind:mqar,length:9999,items:600}", "at most 128"),
        ("evaluation.recall.a={kind:mqar}", "evaluation.recall.a.length: to be given"),
        ("evaluation.recall.a={kind:mqer,length:64}", "did you mean mqar"),
        ("precision=fp8", "evaluation.recall.fine.length=200 is no multiple of 16, .* set it to 208"),
        ("evaluation.recall_separators=[1,2,3]", "give 4 different ids"),
        ("evaluation.recall_symbols=4095", "set it to at most 4092"),
    ],
)
def test_a_plan_refuses_tasks_that_cannot_be(override, problem):
    tasks = "evaluation.recall.fine={kind:phonebook,length:200}"
    make_plan(compose(["model=hymba_tiny", tasks]), check_paths=False)
    with pytest.raises(UserError, match=problem):
        make_plan(compose(["model=hymba_tiny", tasks, override]), check_paths=False)


def test_usual_numbers_of_items_fit():
    sizes = {k: items_of(RecallTaskConfig(k, n)) for k, n in (("mqar", 512), ("phonebook", 512), ("needle", 60))}
    assert sizes == {"mqar": 64, "phonebook": 32, "needle": 3}
