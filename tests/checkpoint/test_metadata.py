"""checkpoint.json: what fits, what is refused, and what is only remarked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hymba_train.checkpoint.directory import METADATA
from hymba_train.checkpoint.metadata import (
    Layout,
    changed_keys,
    check_model,
    metadata_of,
    origin_of,
    read_metadata,
    write_metadata,
)
from hymba_train.errors import UserError
from tests.train.tiny_run import tiny_config

LAYOUT = Layout(1, 1, 1, 1, 1, "cpu")
STATE = {"step": 5, "phase": 0, "samples_in_phase": 40, "samples": 40, "tokens": 640}


@pytest.fixture
def saved(tmp_path) -> Path:
    write_metadata(tmp_path, metadata_of(tiny_config(tmp_path), LAYOUT, STATE))
    return tmp_path


def test_round_trip(saved):
    metadata = read_metadata(saved)
    assert metadata["train_state"] == STATE and Layout(**metadata["layout"]) == LAYOUT
    assert set(metadata["versions"]) == {"python", "torch", "megatron_core"}
    assert check_model(saved, metadata, tiny_config(saved)) == []
    assert changed_keys(metadata, tiny_config(saved)) == []


def test_the_origin_of_foreign_weights_is_handed_on(tmp_path, saved):
    assert origin_of(read_metadata(saved)) is None
    origin = {"source": "elsewhere/model", "license": "some-licence-1.0"}
    assert origin_of(read_metadata(saved) | {"imported": {**origin, "token_ids": {}}}) == origin
    write_metadata(tmp_path, metadata_of(tiny_config(tmp_path), LAYOUT, STATE, origin=origin))
    assert origin_of(read_metadata(tmp_path)) == origin


def test_another_model_is_refused_key_by_key(saved):
    config = tiny_config(saved, **{"model.hidden_size": 64, "model.window_size": 9})
    with pytest.raises(UserError) as error:
        check_model(saved, read_metadata(saved), config)
    lines = error.value.problems
    assert len(lines) == 2
    assert "model.hidden_size=32, the configuration 64" in lines[0] and "model.window_size=8" in lines[1]


def test_name_initialisation_and_padding_are_free(saved):
    config = tiny_config(
        saved, **{"model.name": "x", "model.init_method": "published", "model.make_vocab_size_divisible_by": 64}
    )
    assert check_model(saved, read_metadata(saved), config) == []


def test_context_extension_is_remarked(saved):
    config = tiny_config(saved, **{"model.rope_type": "ntk", "model.max_position_embeddings": 8192})
    remarks = check_model(saved, read_metadata(saved), config)
    assert len(remarks) == 2 and "model.rope_type is ntk now, default" in remarks[1]


def test_another_rotary_base_is_a_context_extension(saved):
    config = tiny_config(saved, **{"model.rotary_base": 500000.0})
    (remark,) = check_model(saved, read_metadata(saved), config)
    assert "model.rotary_base is 500000.0 now, 10000.0" in remark


def test_nothing_here_imports_what_stands_above_it():
    """config -> ... -> train -> checkpoint -> convert."""
    import hymba_train.checkpoint

    for path in Path(hymba_train.checkpoint.__file__).parent.glob("*.py"):
        assert "hymba_train.convert" not in path.read_text(), path


def test_changes_that_shape_training_are_listed(saved):
    config = tiny_config(saved, **{"optim.lr": 0.5, "logging.log_interval": 7, "run.name": "other"})
    assert changed_keys(read_metadata(saved), config) == ["optim.lr: 0.01 -> 0.5"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 1, "layout": {"tensor": 1}}', "\0\1"])
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, text):
    (tmp_path / METADATA).write_text(text)
    with pytest.raises(UserError, match=f"{METADATA}: cannot be read") as error:
        read_metadata(tmp_path)
    assert len(error.value.problems) == 1


def test_a_newer_schema_is_refused(saved):
    metadata = json.loads((saved / METADATA).read_text())
    (saved / METADATA).write_text(json.dumps({**metadata, "schema_version": 99}))
    with pytest.raises(UserError, match="schema_version 99"):
        read_metadata(saved)
