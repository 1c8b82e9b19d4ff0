"""Packed phases: built offline, checked when opened, read as samples that lose and leak nothing."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from hymba_train.data.build import build_training_data, load_tokenizer, open_source, pack_location
from hymba_train.data.dataset import TrainingData
from hymba_train.data.packs import build_packs, verify_packs
from hymba_train.errors import UserError

SEQ_LENGTH = 128
STRATEGIES = ("best_fit", "length_buckets")


@pytest.fixture
def copied(demo, tmp_path):
    """The demo's tokenizer and its docs (170 documents), which a test may damage."""
    directory = tmp_path / "data"
    shutil.copytree(demo, directory, ignore=lambda _, names: [n for n in names if n[:4] in ("book", "code", "spee")])
    return directory


def make_config(directory, packing="best_fit", **phase) -> DataConfig:
    values = dict(tokens=10_000, seq_length=SEQ_LENGTH, global_batch_size=8, blend={"docs": 1.0}) | phase
    return DataConfig(
        path=str(directory),
        tokenizer="tokenizer",
        sources={"docs": SourceConfig("docs", 0.05)},
        phases={"main": PhaseConfig(packing=packing, **values)},
    )


def pack(config: DataConfig) -> str:
    """What `hymba data pack` does for the one phase; returns the path."""
    phase = config.phases["main"]
    source = open_source(config, "docs", config.sources["docs"], load_tokenizer(config))
    path = pack_location(config, phase, source)
    build_packs(source.training, path, phase.packing, phase.seq_length, phase.min_document_tokens)
    return path


def build(config: DataConfig, **changes) -> TrainingData:
    for key, value in changes.items():
        setattr(config, key, value)
    return build_training_data(config, seed=1, vocab_size=4096)


def problem(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        build(config)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


@pytest.mark.parametrize("packing", STRATEGIES)
def test_an_epoch_predicts_every_token_but_the_first_of_every_document_once(copied, packing):
    config = make_config(copied, packing)
    pack(config)
    training_data = build(config)
    part = training_data.sources["docs"].training
    sequences = training_data.sequences(0, "docs")
    predicted = np.zeros(part.end, dtype=int)
    for n in range(len(sequences)):
        sample = training_data.sample(0, n)
        starts, lengths = sequences.pieces(sample["window"])
        places = np.concatenate([np.arange(s, s + k) for s, k in zip(starts, lengths, strict=True)])
        labelled = np.flatnonzero(sample["labels"] != -100)
        predicted[places[labelled + 1]] += 1
        # Labels are the next tokens; segments are the pieces, and padding one more; positions restart in each.
        assert np.array_equal(sample["labels"][labelled], sample["tokens"][labelled + 1])
        assert np.array_equal(part.tokens.tokens(0, part.end)[places], sample["tokens"][: places.size])
        edges = np.concatenate([[0], np.cumsum(lengths)])
        for segment, (begin, end) in enumerate(zip(edges[:-1], np.minimum(edges[1:], SEQ_LENGTH), strict=True)):
            assert set(sample["segment_ids"][begin:end]) == {segment}
            assert sample["positions"][begin:end].tolist() == list(range(end - begin))
        padding = slice(edges[-1], None)
        assert set(sample["tokens"][padding]) <= {2}
        assert set(sample["segment_ids"][padding]) <= {len(lengths)}
        assert set(sample["labels"][edges[-1] - 1 :]) <= {-100}
    expected = np.ones_like(predicted)
    expected[part.tokens.document_offsets(part.begin_document, part.end_document)[:-1]] = 0
    assert predicted.tolist() == expected.tolist()


def test_fill_is_near_perfect_and_only_long_documents_are_cut(copied):
    facts = verify_packs(pack(make_config(copied)))
    assert facts["num_padding_tokens"] < 0.02 * facts["num_sequences"] * (SEQ_LENGTH + 1)
    training_data = build(make_config(copied))
    tokens = training_data.sources["docs"].training.tokens
    sizes = [tokens.document(d).size for d in range(facts["end_document"])]
    assert facts["num_documents_cut"] == sum(size > SEQ_LENGTH + 1 for size in sizes)


def test_without_document_mask_only_the_padding_has_no_loss(copied):
    config = make_config(copied)
    pack(config)
    training_data = build(config, document_mask=False)
    sequences = training_data.sequences(0, "docs")
    seen_padding = False
    for n in range(len(sequences)):
        sample = training_data.sample(0, n)
        assert sample["segment_ids"] is None
        num_tokens = sequences.num_tokens(sample["window"])
        seen_padding |= num_tokens <= SEQ_LENGTH
        expected = sample["tokens"][1:].copy()
        expected[num_tokens - 1 :] = -100
        assert sample["labels"].tolist() == expected.tolist()
    assert seen_padding


def test_short_documents_left_out(copied):
    config = make_config(copied, min_document_tokens=1000)
    path = pack(config)
    assert path.endswith(".best_fit-128-min1000.pack")
    training_data = build(config)
    source = training_data.sources["docs"].training.tokens
    sequences = training_data.sequences(0, "docs")
    for n in range(len(sequences)):
        for start in sequences.pieces(n)[0]:
            assert source.document(source.document_at(int(start))).size >= 1000
    assert verify_packs(path)["num_documents_left_out"] > 0


def test_token_outside_the_vocabulary_is_named_by_its_place_in_the_file(copied):
    config = make_config(copied)
    pack(config)
    training_data = build(config)
    training_data.vocab_size = 300  # as if the model's vocabulary were smaller
    with pytest.raises(UserError, match=r"docs.bin: token (\d+) \(byte \d+\) is (\d+), outside") as caught:
        training_data.sample(0, 0)
    words = str(caught.value).split()
    place, value = int(words[2]), int(words[6].rstrip(","))
    assert training_data.sources["docs"].training.tokens.tokens(place, place + 1).tolist() == [value]


def test_a_job_never_builds_a_packing_itself(copied):
    line = problem(make_config(copied))
    assert line == (
        f"{copied}/docs.best_fit-128.pack does not exist: build it once, offline, with `hymba data pack` and the "
        "overrides of this run (a job never builds it)"
    )
    assert not list(copied.glob("*.pack*"))


def test_plan_tells_of_a_packing_that_is_missing_before_a_gpu_is_held(copied):
    from hymba_train.config.schema import Config
    from hymba_train.plan.paths import check_files

    config = Config(data=make_config(copied))
    assert check_files(config) == [
        f"data.phases.main.packing=best_fit: no {copied}/docs.best_fit-128.pack; make it once, offline: "
        "`hymba data pack` with the overrides of this run"
    ]
    pack(config.data)
    assert check_files(config) == []


def test_a_packing_of_another_split_or_another_source_is_refused(copied):
    path = pack(make_config(copied))
    config = make_config(copied)
    config.sources["docs"].validation_fraction = 0.3
    assert problem(config).startswith(f"{path} was built for end_document 1")
    (copied / "docs.idx").write_bytes((copied / "docs.idx").read_bytes())  # the same again is the same
    assert build(make_config(copied)).sample(0, 0)["source"] == "docs"
    main(["tokenize", "--input", str(_docs()), "--tokenizer", str(copied / "tokenizer"), "--overwrite", "--quiet",
          "--output-prefix", str(copied / "docs"), "--shuffle-documents", "1", "--workers", "1"])  # fmt: skip
    assert "was built for" in problem(make_config(copied))


def _docs():
    from data_prep.demo import CORPUS

    return CORPUS / "docs.jsonl"


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -30])
def test_a_damaged_packing_is_one_line(copied, keep):
    path = pack(make_config(copied))
    os.truncate(path, keep if keep >= 0 else os.path.getsize(path) + keep)
    assert problem(make_config(copied)) == (
        f"{path} is not a whole .pack file: build it again with `hymba data pack --overwrite`"
    )


def test_verify_reads_every_byte(copied, capsys):
    path = pack(make_config(copied))
    assert main(["validate", str(copied / "docs")]) == 0
    assert "sha256 agrees with its trailer" in capsys.readouterr().out
    content = bytearray(Path(path).read_bytes())
    content[1000] ^= 1
    Path(path).write_bytes(content)
    assert main(["validate", str(copied / "docs")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} has another sha256 than its trailer says")


def test_min_document_tokens_needs_a_packing(copied):
    line = problem(make_config(copied, packing="concat", min_document_tokens=5))
    assert line.startswith("data.phases.main.min_document_tokens=5 has no effect on packing=concat")


def test_no_document_is_long_enough(copied):
    with pytest.raises(UserError, match=r"docs: none of its \d+ documents has 1000000 tokens"):
        pack(make_config(copied, min_document_tokens=1_000_000))
    assert not list(copied.glob("*.pack*"))


def test_the_packing_is_part_of_the_identity(copied):
    config = make_config(copied)
    pack(config)
    pack(make_config(copied, "length_buckets"))
    a, b, c = (build(make_config(copied, packing)).identity() for packing in ("concat", *STRATEGIES))
    assert a != b != c != a
