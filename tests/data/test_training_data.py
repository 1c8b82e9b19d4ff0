"""Samples are a function of (seed, blend, phase, n): every layout and every restart reads the same."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from hymba_train.data.batches import batch_hash, micro_batches, validation_batches
from hymba_train.data.build import build_training_data
from hymba_train.data.dataset import TrainingData
from hymba_train.errors import UserError

SEQ_LENGTH = 64
BLEND = {"books": 0.4, "docs": 0.3, "code": 0.2, "speeches": 0.1}


def make_config(demo, **changes) -> DataConfig:
    phase = PhaseConfig(tokens=400_000, seq_length=SEQ_LENGTH, global_batch_size=16, blend=BLEND)
    decay = PhaseConfig(tokens=100_000, seq_length=2 * SEQ_LENGTH, global_batch_size=8, blend={"books": 1, "code": 1})
    config = DataConfig(
        tokenizer="tokenizer",
        path=str(demo),
        sources={name: SourceConfig(name, 0.05) for name in BLEND},
        phases={"main": phase, "decay": decay},
        validation_sequences=10,
        document_mask=False,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def build(demo, seed: int = 1234, **changes) -> TrainingData:
    return build_training_data(make_config(demo, **changes), seed=seed, vocab_size=4096)


def tokens_of(training_data, phase_index, numbers):
    return [training_data.sample(phase_index, n)["tokens"].tolist() for n in numbers]


def test_labels_are_the_next_tokens(demo):
    sample = build(demo).sample(0, 5)
    assert sample["tokens"].shape == (SEQ_LENGTH + 1,)
    assert sample["tokens"].dtype == np.int64
    assert sample["labels"].tolist() == sample["tokens"][1:].tolist()
    assert sample["positions"] is None
    assert sample["segment_ids"] is None


def test_a_sample_does_not_depend_on_what_was_read_before(demo):
    in_order = tokens_of(build(demo), 0, range(300))
    backwards = build(demo)
    assert tokens_of(backwards, 0, reversed(range(300))) == in_order[::-1]
    resumed = build(demo)
    assert tokens_of(resumed, 0, range(177, 300)) == in_order[177:]


def test_seed_and_phase_change_the_order(demo):
    numbers = range(20)
    reference = tokens_of(build(demo), 0, numbers)
    assert tokens_of(build(demo, seed=1), 0, numbers) != reference
    renamed = make_config(demo)
    renamed.phases = {"other": renamed.phases["main"]}
    assert tokens_of(build_training_data(renamed, seed=1234, vocab_size=4096), 0, numbers) != reference


def test_a_phase_shuffles_its_sources_anew(demo):
    phases = {
        name: PhaseConfig(tokens=10_000, seq_length=SEQ_LENGTH, global_batch_size=8, blend={"books": 1.0})
        for name in ("first", "second")
    }
    training_data = build(demo, phases=phases)
    first, second = ([training_data.locate(index, n)[2] for n in range(100)] for index in (0, 1))
    assert first != second


def test_length_of_a_phase_and_other_phases_do_not_change_the_order(demo):
    changed = make_config(demo)
    changed.phases = {"decay": changed.phases["decay"], "main": changed.phases["main"]}
    changed.phases["main"].tokens *= 3
    changed.phases["main"].global_batch_size = 4
    other = build_training_data(changed, seed=1234, vocab_size=4096)
    assert tokens_of(other, 1, range(50)) == tokens_of(build(demo), 0, range(50))


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(demo):
    training_data = build(demo)
    seen: dict[tuple[str, int], list[int]] = {}
    for n in range(16000):
        name, epoch, window = training_data.locate(0, n)
        seen.setdefault((name, epoch), []).append(window)
    books = training_data.sources["books"].training
    num_windows = (books.num_tokens - 1) // SEQ_LENGTH
    assert sorted(seen["books", 0]) == list(range(num_windows))
    assert sorted(seen["books", 1]) == list(range(num_windows))
    assert seen["books", 0] != seen["books", 1]


def test_blend_is_kept_and_the_held_out_part_never_read(demo):
    training_data = build(demo)
    counts = Counter()
    for n in range(1280):
        sample = training_data.sample(0, n)
        counts[sample["source"]] += 1
        part = training_data.sources[sample["source"]].training
        begin = sample["window"] * SEQ_LENGTH
        assert begin + SEQ_LENGTH < part.end
    assert counts == {"books": 512, "docs": 384, "code": 256, "speeches": 128}


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_every_layout_trains_on_the_same_samples(demo, data_parallel_size, micro_batch_size):
    first, size = 48, 16
    by_rank = [
        micro_batches(
            build(demo, document_mask=True),
            0,
            first,
            global_batch_size=size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
        )
        for rank in range(data_parallel_size)
    ]
    control = build(demo, document_mask=True)
    expected = [control.sample(0, n) for n in range(first, first + size)]
    in_order = [batch for turn in zip(*by_rank, strict=True) for batch in turn]
    for key in ("labels", "positions", "segment_ids"):
        rows = torch.cat([batch[key] for batch in in_order])
        assert rows.dtype == torch.int64
        assert rows.tolist() == [sample[key].tolist() for sample in expected]
    rows = torch.cat([batch["tokens"] for batch in in_order])
    assert rows.tolist() == [sample["tokens"][:-1].tolist() for sample in expected]
    assert all(batch["tokens"].shape == (micro_batch_size, SEQ_LENGTH) for batch in in_order)


def test_global_batch_that_cannot_be_dealt_out_is_an_error(demo):
    with pytest.raises(UserError, match="global batch size 16 is not a multiple of micro_batch_size 3 x data-parallel"):
        micro_batches(build(demo), 0, 0, global_batch_size=16, micro_batch_size=3, data_parallel_size=2)


def test_no_document_mask_gives_neither_positions_nor_segments(demo):
    (batch,) = micro_batches(build(demo), 1, 0, global_batch_size=2, micro_batch_size=2)
    assert batch.keys() == {"tokens", "labels"}
    assert batch["labels"][:, :-1].tolist() == batch["tokens"][:, 1:].tolist()


@pytest.mark.parametrize(("micro_batch_size", "data_parallel_size"), [(1, 1), (4, 1), (1, 4), (3, 2), (10, 1)])
def test_validation_is_the_same_in_every_layout(demo, micro_batch_size, data_parallel_size):
    training_data = build(demo)
    by_rank = [
        validation_batches(
            training_data,
            "docs",
            SEQ_LENGTH,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
        )
        for rank in range(data_parallel_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    rows = [
        (tokens.tolist(), labels.tolist())
        for turn in zip(*by_rank, strict=True)
        for batch in turn
        for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True)
    ]
    labelled = [row for row in rows if set(row[1]) != {-100}]
    expected = [training_data.validation_sample("docs", SEQ_LENGTH, i) for i in range(10)]
    assert labelled == [(sample["tokens"][:-1].tolist(), sample["labels"].tolist()) for sample in expected]


def test_validation_reads_the_held_out_part_evenly(demo):
    training_data = build(demo)
    windows = [training_data.validation_sample("books", SEQ_LENGTH, i)["window"] for i in range(10)]
    held_out = training_data.sources["books"].held_out
    assert held_out.num_tokens >= 0.05 * (held_out.num_tokens + training_data.sources["books"].training.num_tokens)
    steps = np.diff(windows)
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1
    assert windows[-1] == 9 * ((held_out.num_tokens - 1) // SEQ_LENGTH) // 10
    first = training_data.validation_sample("books", SEQ_LENGTH, 0)["tokens"]
    assert first.tolist() == held_out.tokens.tokens(held_out.begin, held_out.begin + SEQ_LENGTH + 1).tolist()


def test_batch_hash_is_pinned_to_the_samples(demo):
    training_data = build(demo)
    reference = batch_hash(training_data, 0, 32, 16)
    assert batch_hash(build(demo), 0, 32, 16) == reference
    assert batch_hash(training_data, 0, 33, 16) != reference
    assert batch_hash(build(demo, seed=9), 0, 32, 16) != reference


def test_identity_follows_what_decides_the_samples(demo):
    reference = build(demo).identity()
    assert build(demo).identity() == reference
    assert build(demo, seed=9).identity() != reference
    assert build(demo, document_mask=True).identity() != reference
    assert build(demo, sources={name: SourceConfig(name, 0.1) for name in BLEND}).identity() != reference
    longer = make_config(demo)
    longer.phases["main"].tokens *= 2
    assert build_training_data(longer, seed=1234, vocab_size=4096).identity() == reference
    blended = make_config(demo)
    blended.phases["main"].blend = {**BLEND, "books": 0.5}
    assert build_training_data(blended, seed=1234, vocab_size=4096).identity() != reference


def test_description_tells_tokens_and_epochs(demo):
    training_data = build(demo)
    lines = training_data.describe()
    books = training_data.sources["books"]
    assert lines[0] == (
        f"source books: {books.training.num_tokens:,} tokens in {books.training.num_documents} documents, held out "
        f"{books.held_out.num_tokens:,} in {books.held_out.num_documents}"
    )
    assert lines[4].startswith("phase main: 6,250 sequences of 64 tokens; books 40.0% (1.12 epochs), code 20.0% (")


def test_torch_is_not_imported_without_need():
    code = (
        "import sys, json, hymba_train.data, data_prep.cli;"
        "print(json.dumps([m for m in ('torch', 'megatron') if m in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []
