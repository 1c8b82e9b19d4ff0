"""What run directories say: history over restarts, goodput, states, curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hymba_train.callbacks.jsonl import counting, read_lines
from hymba_train.checkpoint import manifest
from hymba_train.checkpoint.directory import LATEST
from hymba_train.cli import main
from hymba_train.config import compose, freeze
from hymba_train.runs.chart import chart
from hymba_train.runs.metrics import goodput, useful_seconds
from hymba_train.runs.summary import summarize

NOW = 2_000_000_000.0


def start(step, at):
    return {"event": "start", "step": step, "tokens": step * 10, "time": at}


def train(step, seconds, loss=3.0):
    return {"event": "train", "step": step, "tokens": step * 10, "loss": loss, "step_seconds": seconds,
            "tokens_per_second": 10 / seconds}  # fmt: skip


def checkpoint(run: Path, step: int, complete: bool = True) -> None:
    path = run / "checkpoints" / f"step_{step:07d}"
    path.mkdir(parents=True)
    for name in ("checkpoint.json", "metadata.json", ".metadata") if complete else ():
        (path / name).touch()
    (run / "checkpoints" / LATEST).write_text(f"{path.name}\n")


@pytest.fixture
def run(tmp_path):
    """run(lines) -> a run directory, last written at NOW."""

    def make(lines, name="demo") -> Path:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        freeze(compose(["experiment=demo", f"run.name={name}"]), directory / "resolved.yaml")
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.utime(directory / "metrics.jsonl", (NOW, NOW))
        return directory

    return make


def test_a_restart_replaces_what_came_after_its_checkpoint():
    lines = [
        start(0, 0),
        train(10, 1, loss=9),
        train(20, 1, loss=8),
        start(10, 50),
        train(15, 1, loss=7),
        train(20, 1, loss=6),
    ]
    assert [(line["step"], line["loss"]) for line in counting(lines, "train")] == [(10, 9), (15, 7), (20, 6)]
    # a restart that has not logged yet: nothing after its step counts
    assert [line["step"] for line in counting(lines[:4], "train")] == [10]


def test_goodput_counts_each_step_once():
    lines = [start(0, NOW - 100), train(10, 2.0), train(20, 2.0), start(10, NOW - 40), train(20, 3.0)]
    assert useful_seconds(lines) == 10 * 2.0 + 10 * 3.0
    assert goodput(lines, NOW) == pytest.approx(0.5)
    assert goodput([], NOW) is None and goodput([start(0, NOW)], NOW) is None


def test_torn_and_foreign_lines_are_left_out(tmp_path):
    (tmp_path / "m").write_text('{"event": "train", "step": 1}\n[1]\n{"event": "train", "st\n{"event": "x"}\n')
    assert read_lines(tmp_path / "m") == [{"event": "train", "step": 1}]
    assert read_lines(tmp_path / "none") == []


def test_a_summary(run, tmp_path):
    directory = run([start(0, NOW - 100), train(10, 2.0), start(10, NOW - 40), train(20, 2.0, loss=2.5)])
    checkpoint(directory, 10)
    summary = summarize(directory, tmp_path / "runs", NOW + 5)
    assert (summary.name, summary.state, summary.step, summary.tokens, summary.loss) == (
        "demo",
        "running",
        20,
        200,
        2.5,
    )
    assert (summary.checkpoint, summary.restarts, summary.remarks) == (10, 1, ())
    assert summary.goodput == pytest.approx(0.4) and summary.num_steps > 20
    checkpoint(directory, 20, complete=False)
    summary = summarize(directory, tmp_path / "runs", NOW + 5)
    assert summary.checkpoint == 10 and "no complete checkpoint" in summary.remarks[0]


@pytest.mark.parametrize(
    ("lines", "outcome", "age", "state"),
    [
        ([], None, 0, "not started"),
        ([start(0, NOW)], None, 10, "running"),
        ([start(0, NOW)], None, 3700, "silent for 1h01m"),
        ([start(0, NOW), train(10, 60.0), train(20, 60.0)], None, 3700, "running"),  # a line every ten minutes
        ([start(0, NOW), {"event": "end", "step": 3, "reason": "ValueError: x"}], None, 10, "failed (ValueError: x)"),
        ([start(0, NOW)], "finished 5 all phases trained", 99999, "finished"),
        ([start(0, NOW)], "stopped 5 time limit", 99999, "stopped (time limit)"),
        ([start(0, NOW)], "failed 5 a spike", 99999, "ended by a guard (a spike)"),
    ],
)
def test_states(run, tmp_path, lines, outcome, age, state):
    directory = run(lines)
    if outcome:
        (directory / "outcome").write_text(outcome + "\n")
    assert summarize(directory, tmp_path / "runs", NOW + age).state == state


@pytest.mark.parametrize(
    ("queue", "state"), [("PENDING", "job 7 pending"), ("RUNNING", "job 7 running"), ("", "running")]
)
def test_what_slurm_knows(run, tmp_path, monkeypatch, queue, state):
    directory = run([start(0, NOW)])
    (directory / "slurm" / "0001").mkdir(parents=True)
    (directory / "slurm" / "0001" / "launch.json").write_text('{"jobs": ["7"], "script": "job.sh"}')
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f'#!/bin/sh\n[ -n "{queue}" ] && echo "7 {queue}" || exit 1\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    assert summarize(directory, tmp_path / "runs", NOW + 5).state == state


def test_the_table(run, tmp_path, capsys):
    checkpoint(run([start(0, NOW - 100), train(10, 2.0)], "b"), 10)
    run([], "group/a")
    (tmp_path / "runs" / "no_run").mkdir()
    assert main(["runs", "--directory", str(tmp_path / "runs")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:] if line.strip()]
    assert [row[0] for row in rows] == ["b", "group/a"]
    assert rows[0][-5:] == ["100", "3.0000", "10", "0", "20%"]
    assert main(["runs", "list", "--json", "--directory", str(tmp_path / "runs")]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == ["b", "group/a"]


def test_checkpoints_are_held_to_their_checksums(run, tmp_path, capsys):
    directory = run([start(0, NOW - 100), train(10, 2.0)])
    checkpoint(directory, 10)
    newest = directory / "checkpoints" / "step_0000010"
    manifest.write(newest, manifest.make(newest))
    base = ["runs", "--directory", str(tmp_path / "runs")]
    assert main([*base, "--verify"]) == 0 and "10 (verified)" in capsys.readouterr().out
    (newest / "metadata.json").write_text("x")
    assert main(base) == 0 and "10  " in capsys.readouterr().out  # not looked
    assert main([*base, "--verify"]) == 1
    out, err = capsys.readouterr()
    assert "10 (damaged)" in out and str(newest / "metadata.json") in err


def test_show(run, tmp_path, capsys):
    held_out = {"event": "validation", "step": 20, "tokens": 200, "loss": {"books": 2.25, "code": None}}
    run([start(0, NOW - 100), *(train(s, 1.0, loss=5 - s / 10) for s in range(1, 21)), held_out])
    base = ["--directory", str(tmp_path / "runs")]
    assert main(["runs", "show", "demo", *base]) == 0
    out = capsys.readouterr().out
    assert "books 2.2500  code nan (step 20)" in out and "4.900 ┤" in out and "3.000 ┤" in out
    assert main(["runs", "show", "demo", "--png", str(tmp_path / "x.png"), *base]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes(run, tmp_path, capsys):
    run([])
    base = ["--directory", str(tmp_path / "runs")]
    for arguments, expected in (
        (["show", "dmo", *base], "no such run in"),
        (["show", "dmo", *base], "did you mean demo?"),
        (["show", "demo", *base], "no step has been logged yet"),
        (["list", "--directory", "/no/such"], "no such directory"),
        (["lst"], "did you mean list?"),
    ):
        assert main(["runs", *arguments]) == 2
        assert expected in capsys.readouterr().err
    run([start(0, NOW), train(1, 1.0)], "one")
    assert main(["runs", "show", "one", "--png", "/no/such/x.png", *base]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_chart_of_a_straight_line():
    lines = chart([0, 1], [0, 1], width=4, height=2, x_label="tokens", y_format=".1f")
    assert [line[:5] for line in lines[:2]] == ["1.0 ┤", "0.0 ┤"] and lines[2].split() == ["0", "1", "tokens"]
    grid = [[ord(c) - 0x2800 for c in line.partition("┤")[2]] for line in lines[:2]]
    assert grid[1][0] & 0x40 and grid[0][3] & 0x08  # from the lower left dot to the upper right one
    assert not grid[0][0] and not grid[1][3]


def test_chart_of_what_cannot_be_drawn():
    nan = float("nan")
    assert chart([1, 2], [nan, nan], 10, 3, "x", ".1f") == ["(nothing to draw)"]
    assert len(chart([1, 2, 3], [1.0, nan, 1.0], 10, 3, "x", ".1f")) == 4


def test_it_starts_without_torch(run, tmp_path):
    run([start(0, time.time()), train(1, 1.0)])
    code = (
        "import sys\nfrom hymba_train.cli import main\n"
        f"assert main(['runs', 'show', 'demo', '--directory', {str(tmp_path / 'runs')!r}]) == 0\n"
        "print([m for m in sys.modules if m in ('torch', 'megatron.core', 'matplotlib')])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
