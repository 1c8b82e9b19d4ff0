"""The resolved configuration on disk."""

import os

import pytest
import yaml

from hymba_train.config import compose, flatten, freeze, freeze_run, load_frozen, run_directory, to_plain
from hymba_train.errors import UserError


@pytest.fixture
def demo(tmp_path):
    return compose(["experiment=demo", f"run.directory={tmp_path}", "logging.profile='10:20'", "optim.adam_eps=1e-8"])


def test_round_trip_is_exact(demo, tmp_path):
    path = freeze(demo, tmp_path / "deep" / "resolved.yaml")
    assert load_frozen(path) == demo
    assert path.read_text().startswith("# Resolved configuration of a run, written by hymba_train 0.")


def test_keys_stand_in_the_order_of_the_schema(demo, tmp_path):
    plain = yaml.safe_load(freeze(demo, tmp_path / "r.yaml").read_text())
    assert list(flatten(plain)) == list(flatten(to_plain(demo)))
    assert list(plain)[:2] == ["model", "parallel"] and list(plain["data"]["phases"]) == ["stable", "long"]


def test_the_run_directory_is_named_after_the_run(demo, tmp_path):
    assert run_directory(demo) == tmp_path / "demo"
    path, changes = freeze_run(demo)
    assert (path, changes) == (tmp_path / "demo" / "resolved.yaml", [])
    assert freeze_run(demo) == (path, [])
    assert [p.name for p in path.parent.iterdir()] == ["resolved.yaml"]


def test_a_changed_configuration_is_told_and_the_earlier_one_kept(demo):
    path, _ = freeze_run(demo)
    before = path.read_text()
    demo.optim.lr = 1e-3
    del demo.data.phases["long"]
    _, changes = freeze_run(demo)
    assert changes[0] == "optim.lr: 0.003 -> 0.001"
    assert "data.phases.long.tokens: 65536 -> (not there)" in changes
    assert load_frozen(path) == demo
    assert path.with_name("resolved.1.yaml").read_text() == before
    demo.optim.lr = 2e-3
    freeze_run(demo)
    assert path.with_name("resolved.2.yaml").is_file()


def test_a_run_directory_of_another_model_is_refused(demo):
    path, _ = freeze_run(demo)
    before = path.read_text()
    demo.model.hidden_size = 256
    with pytest.raises(UserError, match=r"model.hidden_size: 128 -> 256: .*choose another run.name"):
        freeze_run(demo)
    assert path.read_text() == before


def test_a_crash_while_writing_leaves_the_old_file(demo, tmp_path, monkeypatch):
    path = freeze(demo, tmp_path / "r.yaml")
    demo.run.seed = 1

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        freeze(demo, path)
    assert load_frozen(path).run.seed == 1234


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such file"),
        ("model: [1", "not plain YAML"),
        ("- 1\n", "holds no configuration"),
        ("run: {seed: !!python/object/apply:os.getpid []}\n", "not plain YAML"),
        ("run: {sed: 3}\n", "run.sed: unknown key; did you mean run.seed?"),
        ("run: {seed: x}\n", "run.seed: expected int; got 'x' (text)"),
    ],
)
def test_a_file_that_is_no_frozen_configuration_is_refused(tmp_path, text, expected):
    path = tmp_path / "resolved.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_frozen(path)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)


def test_a_directory_that_cannot_be_written_is_a_users_error(demo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"choose another run\.directory"):
        freeze(demo, tmp_path / "file" / "resolved.yaml")
