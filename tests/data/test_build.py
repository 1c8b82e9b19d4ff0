"""Every mistake in the data configuration is one clear line, and all are told at once."""

import json
import os
import shutil

import numpy as np
import pytest

from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from hymba_train.data.build import build_training_data
from hymba_train.errors import UserError


@pytest.fixture
def copied(demo, tmp_path):
    """A copy of the demo data that a test may damage."""
    directory = tmp_path / "copied"
    shutil.copytree(demo, directory)
    return directory


def make_config(directory, **changes) -> DataConfig:
    config = DataConfig(
        tokenizer=str(directory / "tokenizer"),
        sources={"books": SourceConfig(str(directory / "books"), 0.05)},
        phases={"main": PhaseConfig(tokens=10_000, seq_length=64, global_batch_size=8, blend={"books": 1.0})},
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def problems(config: DataConfig, vocab_size: int = 4096) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        build_training_data(config, seed=1, vocab_size=vocab_size)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_the_demo_itself_has_no_problem(copied):
    assert build_training_data(make_config(copied), seed=1, vocab_size=4096).sample(0, 0)["source"] == "books"


def test_model_and_tokenizer_vocabulary_differ(copied):
    assert problems(make_config(copied), vocab_size=32001) == (
        f"model.vocab_size is 32001, but the tokenizer {copied}/tokenizer/tokenizer.json has 4096 tokens: set "
        "model.vocab_size or data.tokenizer",
    )


def test_source_made_with_another_vocabulary(copied):
    path = copied / "books.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["vocab_size"] = 32000
    path.write_text(json.dumps(manifest))
    (line,) = problems(make_config(copied))
    assert line == (
        f"{copied}/books.bin was made with a vocabulary of 32000, but the tokenizer {copied}/tokenizer/tokenizer.json "
        "has 4096 tokens: tokenise it again or set data.tokenizer"
    )


def test_source_made_with_another_tokenizer_of_the_same_size(copied):
    path = copied / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    (line,) = problems(make_config(copied))
    assert line.startswith(f"{copied}/books.bin was made with another tokenizer (sha256 ")
    assert str(path) in line


def test_manifest_of_other_files(copied):
    shutil.copy(copied / "code.json", copied / "books.json")
    (line,) = problems(make_config(copied))
    assert line.startswith(f"{copied}/books.idx has 154535 tokens in 48 documents (uint16), but its manifest")


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}'])
def test_broken_manifest(copied, content):
    (copied / "books.json").write_text(content)
    (line,) = problems(make_config(copied))
    assert line.startswith(f"{copied}/books.json is not a manifest of this version")


def test_missing_files_come_with_the_command_that_makes_them(copied):
    os.remove(copied / "books.idx")
    (line,) = problems(make_config(copied))
    assert line == (
        f"data.sources.books.path: {copied}/books.idx does not exist; make it with `hymba data tokenize --input "
        f"books.jsonl --tokenizer {copied}/tokenizer --output-prefix {copied}/books` (the bundled demo: "
        f"`hymba data prepare-demo --output {copied}`)"
    )


def test_truncated_file(copied):
    os.truncate(copied / "books.bin", 1000)
    (line,) = problems(make_config(copied))
    assert line.startswith(f"{copied}/books.bin has 1000 bytes, but {copied}/books.idx describes 309070")


def test_missing_tokenizer(copied):
    (line,) = problems(make_config(copied, tokenizer=str(copied / "nowhere")))
    assert line.startswith(f"no tokenizer at {copied}/nowhere: give a directory with tokenizer.json")


def test_all_problems_at_once(copied):
    config = make_config(copied)
    config.sources["docs"] = SourceConfig(str(copied / "missing"))
    config.phases["decay"] = PhaseConfig(tokens=1, seq_length=64, global_batch_size=8, blend={"web": 1.0, "books": 1.0})
    config.phases["long"] = PhaseConfig(tokens=1, seq_length=10**6, global_batch_size=8, blend={"books": 1.0})
    lines = problems(config, vocab_size=5000)
    assert len(lines) == 4
    assert lines[0].startswith("model.vocab_size is 5000")
    assert lines[1].startswith("data.sources.docs.path: ")
    assert lines[2] == "data.phases.decay.blend.web: no such source; data.sources has books, docs"
    assert lines[3].startswith("data.phases.long: source books has 142597 tokens to train on, too few for one sequence")


def test_held_out_part_too_short_for_a_sequence(copied):
    config = make_config(copied)
    config.phases["main"].seq_length = 16384
    (line,) = problems(config)
    assert line == (
        "data.sources.books: the held-out part has 11938 tokens, too few for a sequence of 16384: raise "
        "validation_fraction"
    )


def test_nothing_left_to_train_on(write_source, copied, tmp_path):
    write_source("single", [list(range(200))])
    (line,) = problems(make_config(copied, sources={"books": SourceConfig(str(tmp_path / "single"), 0.01)}))
    assert line.startswith("data.sources.books: 1 documents, validation_fraction 0.01: nothing is left to train on")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_bad_fraction(copied, fraction):
    (line,) = problems(make_config(copied, sources={"books": SourceConfig(str(copied / "books"), fraction)}))
    assert line.startswith(f"data.sources.books.validation_fraction = {fraction}")


def test_token_outside_the_vocabulary_is_found_when_it_is_read(write_source, copied, tmp_path):
    write_source("foreign", [[7] * 130 + [4096] + [7] * 200], np.int32)  # no manifest, as Megatron writes it
    built = build_training_data(
        make_config(copied, sources={"books": SourceConfig(str(tmp_path / "foreign"))}), seed=1, vocab_size=4096
    )
    assert "no manifest" in built.describe()[0]
    with pytest.raises(UserError, match=r"foreign.bin: token 130 \(byte 520\) is 4096, outside the model's voc"):
        for n in range(5):
            built.sample(0, n)


def test_relative_paths_start_from_data_path(copied):
    config = make_config(copied, path=str(copied), tokenizer="tokenizer", sources={"books": SourceConfig("books")})
    assert build_training_data(config, seed=1, vocab_size=4096).sources["books"].training.num_documents == 48


def test_unknown_validation_domain(copied):
    built = build_training_data(make_config(copied), seed=1, vocab_size=4096)
    with pytest.raises(UserError, match="no validation domain web; there are books"):
        built.num_validation_samples("web", 64)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_replaced_file_of_the_same_size_is_named_with_its_offset(copied, suffix):
    path = copied / f"books.{suffix}"
    content = bytearray(path.read_bytes())
    offset = 0
    if suffix == "idx":
        content[34 + 8] ^= 1  # length of the third document
    else:
        content[-3:] = b"???"
        offset = len(content) - 65536  # the last of the blocks of 64 kB that are looked at
    path.write_bytes(content)
    (line,) = problems(make_config(copied))
    assert line == (
        f"{path} differs from its manifest in the 65536 bytes from offset {offset}: it was replaced or damaged; copy "
        "or tokenise it again"
    )


def test_the_index_of_another_source_is_named(copied):
    shutil.copy(copied / "code.idx", copied / "books.idx")
    (line,) = problems(make_config(copied))
    assert line.startswith(f"{copied}/books.bin has 309070 bytes, but {copied}/books.idx describes ")


def test_a_file_cut_short_under_a_running_job_is_one_line_not_a_crash(copied):
    built = build_training_data(make_config(copied), seed=1, vocab_size=4096)
    os.truncate(copied / "books.bin", 5000)
    with pytest.raises(UserError, match=r"books.bin ends at byte \d+, \d+ bytes before the end of what its index desc"):
        for n in range(50):
            built.sample(0, n)


def test_sources_without_a_manifest_are_told_apart_by_their_content(copied):
    def identity() -> dict:
        return build_training_data(make_config(copied), seed=1, vocab_size=4096).identity()

    (copied / "books.json").unlink()
    before = identity()
    assert identity() == before
    content = bytearray((copied / "books.bin").read_bytes())
    content[0] ^= 1
    (copied / "books.bin").write_bytes(content)
    assert identity() != before
