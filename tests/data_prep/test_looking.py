"""Tools that look: a sample as training sees it, statistics, packing from the command line."""

import json

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.inspect_sample import sample_text
from data_prep.stats import source_stats
from hymba_train.config import compose
from hymba_train.data.build import build_training_data
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.tokenizer import Tokenizer


@pytest.fixture
def overrides(demo, tmp_path) -> list[str]:
    """The demo's experiment on the demo's data, which lie where packings may be written."""
    for path in demo.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return ["experiment=demo", f"data.path={tmp_path}"]


def test_a_sample_is_shown_as_training_sees_it(overrides, capsys):
    config = compose(overrides)
    data = build_training_data(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    number = next(n for n in range(1000) if len(np.unique(data.sample(0, n)["segment_ids"])) == 3)
    sample = data.sample(0, number)
    assert main(["inspect", *overrides, "--sample", str(number)]) == 0
    out = capsys.readouterr().out
    name, _, window = data.locate(0, number)
    where = f"source {name}, epoch 0, window {window} of "
    assert out.startswith(f"sample {number} of phase stable (seed {config.run.seed}): {where}")
    unlabelled = np.flatnonzero(sample["labels"] == -100)
    assert f"256 inputs, {256 - unlabelled.size} labels, {unlabelled.size} without loss; documents kept apart" in out
    heads = [line for line in out.splitlines() if line.startswith("--- document ")]
    edges = [0, *(np.flatnonzero(np.diff(sample["segment_ids"])) + 1).tolist(), 256]
    for segment, head in enumerate(heads[:3]):
        begin, end = edges[segment], edges[segment + 1]
        assert f"inputs {begin}..{end - 1}, segment {segment}, positions 0..{end - begin - 1}" in head
        assert ("no loss at" in head) == (end - 1 in unlabelled)
    tokenizer = Tokenizer.load(config.data.path + "/tokenizer")
    assert tokenizer.decode(sample["tokens"][edges[1] : edges[2]], skip_special=False) in out


def test_ids_and_labels_one_by_one(overrides, capsys):
    assert main(["inspect", "--sample", "3", "--phase", "long", "--ids", *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "phase long" in lines[0]
    assert sum(" -> " in line for line in lines) == 512


def test_padding_and_pieces_of_a_packed_sample(overrides, capsys):
    packed = [*overrides, "data.phases.long.packing=best_fit"]
    assert main(["pack", *packed]) == 0
    assert main(["pack", *packed]) == 0
    assert "is there already" in capsys.readouterr().out
    config = compose(packed)
    data = build_training_data(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    number = next(n for n in range(10**6) if data.sequences(1, (at := data.locate(1, n))[0]).num_tokens(at[2]) < 512)
    assert number < data.phases[1].num_samples
    text = sample_text(config, "long", number)
    assert "packed sequence" in text
    assert "packing best_fit" in text
    num_tokens = data.sequences(1, data.locate(1, number)[0]).num_tokens(data.locate(1, number)[2])
    assert f"padding: inputs {num_tokens}..511, no loss" in text
    assert f"--- padding: inputs {num_tokens}..511" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--phase", "nosuch"], "--phase nosuch: there is stable, long"),
        (["--sample", "10000000"], "--sample 10000000: phase stable has samples 0.."),
        (["--sample", "-1"], "--sample -1: phase stable has samples 0.."),
    ],
)
def test_samples_that_are_not_there(overrides, capsys, flags, message):
    sample = [] if "--sample" in flags else ["--sample", "0"]
    assert main(["inspect", *overrides, *sample, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_run_of_which_nothing_is_packed(overrides, capsys):
    assert main(["pack", *overrides]) == 2
    assert capsys.readouterr().err == (
        "error: no phase asks for a packing: set data.phases.NAME.packing to best_fit or length_buckets\n"
    )


def test_a_packing_that_pads_much_is_told(overrides, capsys):
    assert main(["pack", *overrides, "data.phases.long.packing=length_buckets"]) == 0
    out = capsys.readouterr().out
    assert "of the positions are padding: there are too few short documents to fill the holes" in out


def test_fetch_opens_and_describes(overrides, capsys):
    assert main(["fetch", *overrides]) == 0
    assert capsys.readouterr().out.startswith("source books: ")


def test_numbers_about_a_source(demo, capsys):
    tokens = IndexedTokens(demo / "docs")
    lengths = np.array([tokens.document(d).size for d in range(tokens.num_documents)])
    stats = source_stats(demo / "docs", [256], str(demo / "tokenizer"))
    assert (stats["num_tokens"], stats["num_documents"]) == (lengths.sum(), lengths.size)
    assert stats["percentiles_document_tokens"][50] == int(np.percentile(lengths, 50, method="lower"))
    assert stats["longest_document_tokens"] == lengths.max()
    assert stats["longer_than"][256]["documents"] == (lengths > 256).sum()
    assert stats["longer_than"][256]["share_of_tokens"] == round(lengths[lengths > 256].sum() / lengths.sum(), 4)
    assert stats["bytes_per_token"] == round(stats["text_bytes"] / lengths.sum(), 3)
    everything = tokens.tokens(0, tokens.num_tokens)
    assert stats["vocabulary_used"] == np.unique(everything).size
    assert stats["most_frequent"][0][2] == np.bincount(everything).max()
    assert main(["stats", str(demo / "docs"), str(demo / "books"), "--json"]) == 0
    assert [entry["prefix"] for entry in json.loads(capsys.readouterr().out)] == [f"{demo}/docs", f"{demo}/books"]
    assert main(["stats", str(demo), "--tokenizer", str(demo / "tokenizer")]) == 0
    out = capsys.readouterr().out
    assert f"{demo}/docs: {lengths.sum():,} tokens in 170 documents, " in out
    assert "  vocabulary: " in out


def test_an_id_outside_the_vocabulary_is_found_by_validate(demo, tmp_path, capsys):
    manifest = json.loads((demo / "docs.json").read_text())
    for suffix in ("bin", "idx"):
        (tmp_path / f"docs.{suffix}").write_bytes((demo / f"docs.{suffix}").read_bytes())
    manifest["tokenizer"]["vocab_size"] = 300
    (tmp_path / "docs.json").write_text(json.dumps(manifest))
    assert main(["validate", str(tmp_path / "docs")]) == 2
    place = int(np.argmax(IndexedTokens(tmp_path / "docs").stored_tokens(0, 10_000) >= 300))
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}/docs.bin: token {place} (byte {2 * place}) is ")
    assert "outside the vocabulary of 300" in err


def test_what_only_the_user_knows_is_asked_for(capsys):
    assert main(["pack", "experiment=pretrain_1p5b"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {key}: to be given, e.g. {key}=..."
        for key in ("data.tokenizer", "data.sources.dclm.path", "data.sources.smollm.path")
    ]
