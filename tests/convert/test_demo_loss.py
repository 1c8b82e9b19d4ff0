"""The demo's model on the demo's text, evaluated after an export: the loss that its training logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hymba_train.callbacks.jsonl import read_events

pytestmark = pytest.mark.slow
pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")


def hymba(*arguments: str) -> str:
    """Output of a hymba command, run as a user runs it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hymba_train", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(3000)
def test_eval_gives_the_loss_of_the_training_log(tmp_path):
    """Ten steps of experiment=demo: four domains of real text, packed documents, 2.8M parameters."""
    data, export = str(tmp_path / "data"), str(tmp_path / "export")
    hymba("data", "prepare-demo", "--output", data)
    hymba(
        "train", "experiment=demo", f"data.path={data}", f"run.directory={tmp_path}", "run.train_steps=10",
        "run.device=cpu", "logging.tensorboard=false", "checkpoint.save_interval=0",
    )  # fmt: skip
    run = tmp_path / "demo"
    last = read_events(run / "metrics.jsonl", "validation")[-1]
    assert last["step"] == 10 and set(last["loss"]) == {"books", "speeches", "docs", "code"}
    hymba("convert", "to-hf", "--checkpoint", str(run), "--output", export)
    for model in ([str(run)], [export, "--data", str(run)]):
        found = json.loads(hymba("eval", "--model", *model, "--device", "cpu", "--json"))
        assert {domain: x["loss"] for domain, x in found.items()} == pytest.approx(last["loss"], abs=1e-4)
    assert max(last["loss"].values()) < 8.3  # it has learnt: ln(4096) is 8.32
