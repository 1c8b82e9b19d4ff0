"""Tokenizers of exports give the ids that training saw."""

from __future__ import annotations

import json
import shutil

import pytest
import sentencepiece

from data_prep.train_tokenizer import train_sentencepiece
from hymba_train.convert.from_hf import import_hf
from hymba_train.convert.to_hf import export_hf
from hymba_train.convert.tokenizer_files import token_ids, write_tokenizer_files
from hymba_train.data.tokenizer import Tokenizer
from tests import golden_data

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
TEXTS = ["", " ", "Hello  world", "  two\n\n\tlines   ", "naïve café ☃ 東京", "</s> is text", "x=1;\n    y = 2"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece file of Llama's form, 300 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(
        train_sentencepiece(["the quick brown fox jumps over the lazy dog " * 20, "hello world " * 20], 300)
    )
    return path


def check_ids(directory, model_file, prefix=()):
    """AutoTokenizer gives what SentencePiece gives; names of special tokens in a text are the one thing it maps."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        if "</s>" not in text:
            assert tokenizer(text).input_ids == [*prefix, *reference.encode(text)], text
    return tokenizer


@pytest.mark.parametrize("form", ["file", "directory"])
def test_a_sentencepiece_model_gets_a_tokenizer_json_with_its_ids(model_file, tmp_path, form):
    ids = write_tokenizer_files(model_file if form == "file" else model_file.parent, tmp_path)
    assert (ids.bos, ids.eos, ids.pad) == (1, 2, 2)
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= {p.name for p in tmp_path.iterdir()}
    tokenizer = check_ids(tmp_path, model_file)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    batch = tokenizer(["hello", "the quick brown fox"], padding=True)
    assert batch.attention_mask[0][0] == 0 and batch.attention_mask[0][-1] == 1  # padded on the left


def test_published_tokenizer_files_go_through_an_import_unchanged(model_file, tmp_path):
    """tokenizer.model alone with an added [PAD], as the published directory would be without its tokenizer.json."""
    model = tmp_path / "model"
    shutil.copytree(golden_data.directory("a_pair_triple_ntk"), model)
    shutil.copyfile(model_file, model / "tokenizer.model")
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]",
                "padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "added_tokens.json").write_text('{"[PAD]": 300}')
    (model / "evil.py").write_text("raise SystemExit")
    run = import_hf(model, tmp_path / "run")
    export = export_hf(run, tmp_path / "export")
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        assert (export / name).read_bytes() == (model / name).read_bytes()
    assert "no tokenizer" not in (export / "README.md").read_text()
    config = json.loads((export / "config.json").read_text())
    assert config["pad_token_id"] == 0  # as published, though the tokenizer's is 300
    loaded = Tokenizer.load(export)
    assert loaded.vocab_size == 301 and token_ids(loaded).pad == 300
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert tokenizer.pad_token_id == 300
