"""A run goes on with the data of its checkpoint, or says so, or not at all: through the real trainer."""

import json

import pytest

from tests.train.test_training import start
from tests.train.tiny_run import write_data

ACCEPT = "checkpoint.accept_changed_data=true"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """(directory, output) of a run that is stopped, resumed with other data, refused, and at last accepted."""
    directory = tmp_path_factory.mktemp("refused")
    write_data(directory)
    files = another(directory, "files", "even.bin", lambda content: content[:100] + b"\x07\x00" + content[102:])
    tokenizer = another(directory, "tokenizer", "tokenizer.json", lambda content: content + b"\n")
    run = ['run.name="changing"', "checkpoint.keep_last=9"]
    output = start(
        directory,
        [*run, "run.train_steps=2"],
        [*run, "run.train_steps=3", f'data.path="{files}"'],
        [*run, "run.train_steps=3", f'data.path="{tokenizer}"'],
        [*run, "run.train_steps=3", "run.seed=99"],
        [*run, "run.train_steps=3", 'data.phases.long.blend={"odd":1.0}'],
        [*run, "run.train_steps=4", "run.seed=99", "data.document_mask=false", ACCEPT],
        [*run, "run.train_steps=5", "run.seed=99", "data.document_mask=false"],
        [*run, "run.train_steps=6", "run.seed=99", "data.document_mask=false", f'data.path="{files}"', ACCEPT],
    )
    return directory, output


def another(directory, name: str, changed: str, change):
    """A copy of the data in which one file is another, of the same name and, for .bin, the same size."""
    copy = directory / name
    copy.mkdir()
    for path in ("tokenizer.json", "odd.bin", "odd.idx", "even.bin", "even.idx"):
        content = (directory / path).read_bytes()
        (copy / path).write_bytes(change(content) if path == changed else content)
    return copy


def record(directory, step: int) -> dict:
    path = directory / "runs" / "changing" / "checkpoints" / f"step_{step:07}" / "checkpoint.json"
    return json.loads(path.read_text())["data"]


def test_changed_data_are_refused(outcome):
    _, output = outcome
    refused = [line for line in output.splitlines() if line.startswith("UserError: ")]
    for line, what in zip(
        refused, ("data.sources.even (files)", "data.tokenizer (sha256)", "run.seed: 1234 -> 99"), strict=True
    ):
        assert line.startswith(f"UserError: step_0000002: {what}")
        assert line.endswith(
            ": going on would repeat, skip or change samples; restore it, or accept that with "
            "checkpoint.accept_changed_data=true (it is recorded)"
        )


def test_a_phase_that_has_not_begun_may_change(outcome):
    directory, _ = outcome
    assert record(directory, 3)["identity"]["phases"][1]["blend"] == {"odd": "1"}
    assert record(directory, 3)["accepted_changes"] == []


def test_an_accepted_change_is_told_and_recorded_in_all_later_checkpoints(outcome):
    directory, output = outcome
    expected = ["run.seed: 1234 -> 99", "data.document_mask: True -> False"]
    for line in expected:
        assert f"accepted other data: {line}" in output
    for step in (4, 5):
        assert record(directory, step)["accepted_changes"] == [f"step 3: {line}" for line in expected]
    *before, last = record(directory, 6)["accepted_changes"]
    assert before == [f"step 3: {line}" for line in expected]
    assert last.startswith("step 5: data.sources.even (files): ")


def test_the_record_names_tokenizer_and_files(outcome):
    directory, _ = outcome
    identity = record(directory, 5)["identity"]
    assert len(identity["tokenizer"]) == len(identity["sources"]["odd"]["files"]) == 64
