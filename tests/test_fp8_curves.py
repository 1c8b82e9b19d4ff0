"""benchmarks/fp8_curves.py on a CPU: two short runs through the real command, and what is made of their losses."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks import fp8_curves
from hymba_train.config import compose
from hymba_train.errors import UserError
from hymba_train.plan import make_plan
from tests.train.tiny_run import write_data

TINY = [
    "model=hymba_tiny", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48",
    "model.global_layers=[0]", "model.kv_groups=[]", "model.num_meta_tokens=4", "model.mamba_dt_rank=4",
    "precision=float32", "run.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sources of the names of experiment=bench_1p5b."""
    path = tmp_path_factory.mktemp("text")
    write_data(path)
    for name in ("books", "speeches", "docs", "code"):
        for ending in ("bin", "idx"):
            shutil.copy(path / f"odd.{ending}", path / f"{name}.{ending}")
    return path


def run(text, output, *arguments):
    overrides = [f"data.path={text}", "data.tokenizer=tokenizer.json", *TINY]
    sizes = ["--micro-batch", "4", "--seq-length", "16", "--steps", "8", "--window", "4", "--output", str(output)]
    return fp8_curves.main([*(f"--override={o}" for o in overrides), *sizes, *arguments])


def test_two_runs_that_differ_in_one_setting(text, tmp_path, capsys):
    assert run(text, tmp_path, "--change", "optim.lr=0.5") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "the model's vocabulary is the tokenizer's 96 tokens, not 4096" in lines
    assert "beyond 0.5 %" in lines[-1] and "optim.lr=0.5: 8 steps" in lines[-2]
    found = json.loads((tmp_path / "curves.json").read_text())
    assert [row["step"] for row in found["rows"]] == [4, 8] and not found["good"] and not found["failures"]
    base, changed = found["curves"]
    assert len(base["loss"]) == 8 and sorted(base["held_out"]) == ["4", "8"]
    assert base["batches"] == changed["batches"] and len(set(base["batches"].values())) == 8
    assert base["loss"]["1"] == changed["loss"]["1"] and base["loss"]["8"] != changed["loss"]["8"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    earlier = ["--base", str(tmp_path / "base" / "metrics.jsonl"), "--change", "optim.adam_eps=1e-7"]
    assert run(text, tmp_path / "again", *earlier) in (0, 1) and not (tmp_path / "again" / "base").exists()
    again = json.loads((tmp_path / "again" / "curves.json").read_text())
    assert again["curves"][0] == base and again["curves"][1]["batches"] == base["batches"]


def curve(losses, held_out, batch="a", name="base"):
    return fp8_curves.Curve(name, losses, held_out, dict.fromkeys(losses, batch), 1000.0, 0, {})


def test_rows_and_verdicts():
    first = curve({1: 4.0, 2: 4.0, 3: 2.0, 4: 2.0, 5: 1.0}, {2: 4.0, 4: 2.0})
    second = curve({1: 4.0, 2: 4.1, 3: 2.0, 4: 2.0}, {2: 4.01, 4: 1.992})
    rows = fp8_curves.compare(first, second, 2)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["train_percent"] == pytest.approx(1.25) and rows[1]["train_percent"] == 0
    assert rows[0]["held_out_percent"] == pytest.approx(0.25) and rows[1]["held_out_percent"] == pytest.approx(-0.4)
    good, words = fp8_curves.verdict(rows, 4, 0.5)
    assert good and "0.400 %" in words
    assert fp8_curves.verdict(rows, 4, 0.3) == (False, "held-out loss: -0.400 % at step 4, beyond 0.3 %")
    good, words = fp8_curves.verdict(rows, 300, 0.5)
    assert not good and "up to step 4 of 300" in words
    assert not fp8_curves.verdict([], 300, 0.5)[0]
    lost = fp8_curves.compare(first, curve(second.loss, {2: float("nan")}), 2)
    assert "beyond" in fp8_curves.verdict(lost, 2, 0.5)[1]
    with pytest.raises(UserError, match="step 1: the runs did not train on the same batch"):
        fp8_curves.compare(first, curve(second.loss, {}, "b"), 2)


def test_a_run_that_is_out_of_time_counts_as_far_as_it_came(monkeypatch, text, tmp_path, capsys):
    seconds = []

    def late(command, log, timeout_seconds):
        """The second one writes four steps."""
        seconds.append(timeout_seconds)
        directory = log.parent / log.stem
        directory.mkdir()
        lines = [dict(event="start", step=0, device="cpu")]
        for step in range(1, 9 if log.stem == "base" else 5):
            lines.append(dict(event="train", step=step, loss=2.0, batch_hash="a", tokens_per_second=9.0))
            if step % 4 == 0:
                lines.append(dict(event="validation", step=step, loss={"books": 2.0, "code": 3.0}))
        (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        if log.stem == "changed":
            raise UserError("train: not done after 9 s")

    monkeypatch.setattr(fp8_curves, "call", late)
    assert run(text, tmp_path, "--timeout", "100") == 1
    assert seconds[0] <= 50 < seconds[1] <= 100
    last = capsys.readouterr().out.splitlines()[-2:]
    assert "not done after 9 s" in last[0] and "only up to step 4 of 8" in last[1]
    assert len(json.loads((tmp_path / "curves.json").read_text())["rows"]) == 1


def test_both_runs_of_the_1p5b_are_ones_that_plan_accepts(monkeypatch, text, tmp_path):
    asked = []
    monkeypatch.setattr(fp8_curves, "call", lambda command, *_: asked.append(command[4:]))
    arguments = [f"--override=data.path={text}", "--override=data.tokenizer=tokenizer.json", "--output", str(tmp_path)]
    assert fp8_curves.main(arguments) == 1  # nothing was trained
    for overrides, fp8 in zip(asked, (None, "delayed"), strict=True):
        config = compose(overrides)
        assert config.precision.fp8 == fp8
        assert make_plan(config, 1, check_paths=False).steps.num_steps == 300
