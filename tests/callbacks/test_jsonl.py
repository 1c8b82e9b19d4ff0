"""metrics.jsonl: every line is JSON, floats survive bit for bit, restarts append."""

from __future__ import annotations

import json
import time

from hymba_train.callbacks.jsonl import JsonLines, counting, read_events
from hymba_train.evaluation.held_out import result_of

FACTS = {"device": "cpu", "mfu_denominator": "n/a: no peak known for CPU"}


def lines(path) -> list[dict]:
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_run_is_one_object_a_line(tmp_path, loop_of):
    path = tmp_path / "metrics.jsonl"
    loop = loop_of(JsonLines(path, FACTS))
    loop.start()
    loop.step(1, loss=0.1 + 0.2, batch_hash="ab12")
    loop.emit("on_evaluation_end", result_of({"books": 1 / 3}))
    loop.emit("on_checkpoint_saved", tmp_path / "step_0000001", 1)
    loop.end()
    records = lines(path)
    assert [r["event"] for r in records] == ["start", "phase", "train", "validation", "checkpoint", "end"]
    start, _, train, validation, checkpoint, end = records
    assert start["mfu_denominator"] == FACTS["mfu_denominator"]
    assert float.fromhex(train["loss_hex"]) == 0.1 + 0.2 != 0.3
    assert train["grad_norm_hex"] == (0.1).hex() and train["batch_hash"] == "ab12" and train["mfu"] is None
    assert float.fromhex(validation["loss_hex"]["books"]) == 1 / 3
    assert checkpoint["path"] == "step_0000001" and end["reason"] == "all phases trained"


def test_not_a_number_stays_valid_json(tmp_path, loop_of):
    path = tmp_path / "metrics.jsonl"
    loop = loop_of(JsonLines(path, FACTS))
    loop.start()
    loop.step(1, loss=float("nan"), grad_norm=float("inf"))
    loop.end()
    train = lines(path)[2]
    assert train["loss"] is None and train["loss_hex"] == "nan" and train["grad_norm_hex"] == "inf"


def test_restarts_append_and_the_last_line_of_a_step_counts(tmp_path, loop_of):
    path = tmp_path / "metrics.jsonl"
    for steps, loss in (((1, 2, 3), 9.0), ((2, 3, 4), 5.0)):
        loop = loop_of(JsonLines(path, FACTS))
        loop.state.step = steps[0] - 1
        loop.start()
        for step in steps:
            loop.step(step, loss=loss)
        loop.end()
    assert [(r["step"], r["loss"]) for r in read_events(path, "train")] == [(1, 9.0), (2, 5.0), (3, 5.0), (4, 5.0)]


def test_a_long_log_is_read_in_time_that_grows_with_its_length():
    """Once it grew with the square: half a minute at the end of a run of 35,000 steps, and an hour for 400,000."""
    log = [{"event": "train", "step": step} for step in range(1, 400_001)]
    begin = time.monotonic()
    found = counting([*log, {"event": "start", "step": 399_000}, {"event": "train", "step": 399_001}], "train")
    assert time.monotonic() - begin < 60
    assert len(found) == 399_001


def test_half_a_line_of_a_killed_process_does_not_spoil_the_next(tmp_path, loop_of):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1, "los')
    loop = loop_of(JsonLines(path, FACTS))
    loop.start()
    loop.step(1)
    loop.end()
    assert [r["step"] for r in read_events(path, "train")] == [1]


def test_an_exception_is_the_reason_of_the_end(tmp_path, loop_of):
    path = tmp_path / "metrics.jsonl"
    loop = loop_of(JsonLines(path, FACTS))
    loop.emit("on_exception", RuntimeError("device lost"))
    assert lines(path)[-1]["reason"] == "RuntimeError: device lost"


def test_half_a_character_is_skipped_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "train", "step": 1}\n{"event": "tr\xc3')
    assert read_events(path, "train") == [{"event": "train", "step": 1}]
