"""A run saved under one layout goes on under another as if nothing had happened; under the same one, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.train.tiny_run import write_data
from tests.warm import server

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SAVED, END = 5, 10
COMMON = [
    "model=hymba_tiny", "parallel.world_size=null",
    "run.device=cpu", "run.name=run", f"run.train_steps={END}", "checkpoint.keep_last=5",
    f"checkpoint.save_interval={SAVED}", "logging.log_interval=1", "logging.eval_interval=5",
    "logging.tensorboard=false", "logging.batch_hash=true", "precision.params=float32", "optim.adam_eps=1e-5",
    "optim.lr=0.003", "schedule.lr_warmup_fraction=0.2",
    "model.name=resume", "model.num_layers=4", "model.hidden_size=40", "model.ffn_hidden_size=54",
    "model.num_attention_heads=5", "model.num_query_groups=5", "model.vocab_size=96", "model.global_layers=[0,3]",
    "model.kv_groups=[[1,2]]", "model.window_size=8", "model.num_meta_tokens=4",
    "model.make_vocab_size_divisible_by=16",
    "data.tokenizer=tokenizer.json", "data.validation_sequences=4",
    "data.sources={odd: {path: odd, validation_fraction: 0.1}, even: {path: even, validation_fraction: 0.1}}",
    # Two phases, so that the data position has two numbers to come back to.
    "data.phases={a: {tokens: 448, seq_length: 16, global_batch_size: 4, blend: {odd: 1, even: 2}},"
    " b: {tokens: 640, seq_length: 32, global_batch_size: 4, blend: {odd: 1}}}",
]  # fmt: skip

# name: (processes, overrides). Every kind of shard meets every other: heads, channels, stages, optimizer state.
LAYOUTS = {
    "single": (1, []),
    "tp2_sp": (
        2,
        [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "data.phases.a.micro_batch_size=2",
            "data.phases.b.micro_batch_size=4",
        ],
    ),
    "pp2": (2, ["parallel.pipeline=2", "checkpoint.async_save=false"]),
    "dp2_distributed_optimizer": (
        2,
        [
            "parallel.distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ],
    ),
}


def run(directory, data, layout: str) -> None:
    processes, overrides = LAYOUTS[layout]
    places = [f"run.directory={directory}", f"data.path={data}"]
    server().run(processes, "hymba_train", "train", *COMMON, *places, *overrides, timeout_seconds=500)


def log(directory) -> dict[int, dict]:
    """Step -> last line about it, validation losses joined in."""
    steps: dict[int, dict] = {}
    for line in (directory / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "train":
            steps[record["step"]] = {**steps.get(record["step"], {}), **record}
        elif record["event"] == "validation":
            steps.setdefault(record["step"], {})["held_out"] = record["loss_hex"]
    return steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_data(directory)
    return directory


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Layout -> the directory of a run of END steps under it, with checkpoints at SAVED and END."""
    done = {}

    def get(layout: str):
        if layout not in done:
            done[layout] = tmp_path_factory.mktemp(layout)
            run(done[layout], data, layout)
        return done[layout]

    return get


def resume(source, directory, data, layout: str) -> dict[int, dict]:
    """Log of a run that finds only the checkpoint at SAVED of ``source``."""
    shutil.copytree(source, directory / "runs")
    checkpoints = directory / "runs" / "run" / "checkpoints"
    shutil.rmtree(checkpoints / f"step_{END:07d}")
    (checkpoints / "latest").write_text(f"step_{SAVED:07d}\n")
    (directory / "runs" / "run" / "metrics.jsonl").unlink()
    run(directory / "runs", data, layout)
    return log(directory / "runs")


@pytest.mark.parametrize("saved,loaded", [("tp2_sp", x) for x in LAYOUTS] + [("dp2_distributed_optimizer", "tp2_sp")])
def test_resume(saved, loaded, uninterrupted, data, tmp_path):
    expected = log(uninterrupted(saved))
    found = resume(uninterrupted(saved), tmp_path, data, loaded)
    assert sorted(found) == list(range(SAVED + 1, END + 1))
    for step, record in found.items():
        whole = expected[step]
        assert (record["phase"], record["tokens"], record["lr"]) == (whole["phase"], whole["tokens"], whole["lr"])
        assert record["batch_hash"] == whole["batch_hash"], "not one sample is repeated, skipped or another"
        if saved == loaded:
            assert (record["loss_hex"], record["grad_norm_hex"]) == (whole["loss_hex"], whole["grad_norm_hex"])
            assert record.get("held_out") == whole.get("held_out")
        else:
            assert record["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert record["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
