"""The sequence of samples of a run: the same under every layout and after every restart, each as often as it should.

No model here: what a rank gets for a step decides everything the data can do wrong.
"""

import hashlib
import math
import random
from collections import Counter

import numpy as np
import pytest

from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from hymba_train.data.batches import micro_batches
from hymba_train.data.build import build_training_data, load_tokenizer, open_source, pack_location
from hymba_train.data.dataset import TrainingData
from hymba_train.data.indexed_writer import IndexedWriter
from hymba_train.data.packs import build_packs
from hymba_train.plan.steps import StepPlan, plan_steps

NUM_STEPS = 1000
BLEND = {"books": 0.4, "docs": 0.3, "code": 0.2, "speeches": 0.1}


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory) -> DataConfig:
    """1,000 steps: a ramp of the batch size, plain windows, then longer packed sequences of another blend."""
    directory = tmp_path_factory.mktemp("order")
    for path in demo.iterdir():
        (directory / path.name).symlink_to(path)
    phases = {
        "ramp": PhaseConfig(
            tokens=32 * 16_000, seq_length=32, global_batch_size=32, blend=BLEND, rampup_batch_size=[16, 16, 32 * 1600]
        ),
        "packed": PhaseConfig(
            tokens=64 * 16 * 700, seq_length=64, global_batch_size=16, blend={"docs": 1, "code": 2}, packing="best_fit"
        ),
    }
    made = DataConfig(
        path=str(directory), tokenizer="tokenizer", sources={name: SourceConfig(name, 0.05) for name in BLEND},
        phases=phases,
    )  # fmt: skip
    for name in phases["packed"].blend:
        source = open_source(made, name, made.sources[name], load_tokenizer(made))
        build_packs(source.training, pack_location(made, phases["packed"], source), "best_fit", 64)
    return made


def open_data(config: DataConfig) -> TrainingData:
    return build_training_data(config, seed=1234, vocab_size=4096)


def steps_of(config: DataConfig) -> StepPlan:
    plan = plan_steps(config.phases)
    assert plan.num_steps >= NUM_STEPS
    assert plan.at(NUM_STEPS - 1).phase == "packed"
    return plan


def hashes_of_step(opened, plan, step, micro_batch_size, size) -> list[str]:
    """Hash of every sample of a step in the order of the global sample numbers, put together from all ranks."""
    info = plan.at(step)
    by_rank = [
        micro_batches(
            opened, info.phase_index, info.first_sample, global_batch_size=info.global_batch_size,
            micro_batch_size=micro_batch_size, data_parallel_rank=rank, data_parallel_size=size,
        )
        for rank in range(size)
    ]  # fmt: skip
    hashes = []
    for turn in zip(*by_rank, strict=True):
        for batch in turn:
            for row in range(micro_batch_size):
                digest = hashlib.blake2b(digest_size=12)
                for key in ("tokens", "labels", "positions", "segment_ids"):
                    digest.update(batch[key][row].numpy().tobytes())
                hashes.append(digest.hexdigest())
    return hashes


@pytest.fixture(scope="module")
def control(config) -> list[list[str]]:
    """1,000 steps of one rank, one sample at a time, without a stop."""
    opened, plan = open_data(config), steps_of(config)
    return [hashes_of_step(opened, plan, step, 1, 1) for step in range(NUM_STEPS)]


def test_the_control_crosses_a_ramp_and_a_phase(config, control):
    plan = steps_of(config)
    assert {len(hashes) for hashes in control[:150]} == {16, 32}
    assert plan.at(0).phase == "ramp"
    flat = [one for step in control for one in step]
    assert len(set(flat)) > 0.5 * len(flat), "samples differ from one another"


@pytest.mark.parametrize(("size", "micro_batch_size"), [(2, 1), (4, 1), (1, 4), (2, 4), (4, 4)])
def test_a_thousand_steps_are_the_same_in_every_layout(config, control, size, micro_batch_size):
    opened, plan = open_data(config), steps_of(config)
    for step in range(NUM_STEPS):
        assert hashes_of_step(opened, plan, step, micro_batch_size, size) == control[step], step


def test_twenty_kills_and_resumes_change_nothing(config, control):
    plan, rng = steps_of(config), random.Random(20)
    kills = sorted(rng.sample(range(1, NUM_STEPS), 20))
    assert any(plan.at(kill).phase == "ramp" for kill in kills)
    assert any(plan.at(kill).phase == "packed" for kill in kills)
    found, state = [], (0, 0)  # what a checkpoint keeps: phase, samples in it
    for kill in [*kills, NUM_STEPS]:
        opened = open_data(config)  # a new process knows nothing but the state
        step = plan.step_at(*state)
        saved = rng.randint(step, kill) if kill < NUM_STEPS else NUM_STEPS  # the newest checkpoint before the kill
        size, micro_batch_size = rng.choice([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 4)])
        walked = [hashes_of_step(opened, plan, s, micro_batch_size, size) for s in range(step, kill)]
        found[step:] = walked  # steps after the checkpoint are trained again
        if saved < NUM_STEPS:
            state = (plan.at(saved).phase_index, plan.at(saved).first_sample)
        assert found == control[:kill]
    assert len(found) == NUM_STEPS


@pytest.mark.parametrize("phase_index", [0, 1], ids=["windows", "packed"])
def test_every_document_is_seen_exactly_as_often_as_the_blend_says(config, phase_index):
    """Per source: K samples of W a pass make K // W passes, and one more of K % W samples; no token oftener."""
    opened = open_data(config)
    phase = opened.phases[phase_index]
    num_samples = 20_000 // phase.blend.block_samples * phase.blend.block_samples
    counts = phase.blend.counts_before(num_samples)
    for name, share in zip(phase.blend.names, phase.blend.shares, strict=True):
        assert abs(counts[name] - share * num_samples) < 1
    seen: dict[str, Counter] = {name: Counter() for name in phase.blend.names}
    for n in range(num_samples):
        name, _, window = opened.locate(phase_index, n)
        seen[name][window] += 1
    for name in phase.blend.names:
        sequences = opened.sequences(phase_index, name)
        passes, rest = divmod(counts[name], len(sequences))
        assert sorted(Counter(seen[name].values()).items()) == sorted(
            (times, windows) for times, windows in ((passes, len(sequences) - rest), (passes + 1, rest))
            if windows and times
        )  # fmt: skip
    # The rarest source is not through its first pass, the commonest is in its second or a later one.
    assert max(counts[name] / len(opened.sequences(phase_index, name)) for name in phase.blend.names) > 1


@pytest.mark.parametrize(("packing", "passes"), [("concat", (3, 2)), ("best_fit", (1, 4)), ("length_buckets", (2, 2))])
def test_a_blend_of_whole_passes_shows_every_document_exactly_so_often(tmp_path, packing, passes):
    """Weights are (sequences in a source) x (passes wanted). What two ranks train on is counted token by token."""
    seq_length, names = 16, ("first", "second")
    sizes = np.random.default_rng(7).integers(2, 40, size=(2, 40))
    sizes[:, -1] += -(sizes.sum(1) - 1) % seq_length  # concat leaves out what does not fill a last sequence
    firsts = [1, 1 + int(sizes[0].sum())]  # token numbers: no token of the two sources is used twice
    vocab_size = firsts[1] + int(sizes[1].sum())
    write_word_tokenizer(tmp_path / "tokenizer.json", vocab_size)
    for name, own, first in zip(names, sizes, firsts, strict=True):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_documents(np.arange(first, first + own.sum()), own)
            writer.publish()
    phase = PhaseConfig(
        tokens=1, seq_length=seq_length, global_batch_size=4, blend={n: 1 for n in names}, packing=packing
    )
    made = DataConfig(
        path=str(tmp_path), tokenizer="tokenizer.json", sources={n: SourceConfig(n) for n in names},
        phases={"main": phase},
    )  # fmt: skip
    if packing != "concat":
        for name in names:
            source = open_source(made, name, made.sources[name], load_tokenizer(made))
            build_packs(source.training, pack_location(made, phase, source), packing, seq_length)
    opened = build_training_data(made, seed=1, vocab_size=vocab_size)
    wanted = [times * len(opened.sequences(0, n)) for n, times in zip(names, passes, strict=True)]
    phase.blend = dict(zip(names, map(float, wanted), strict=True))
    opened = build_training_data(made, seed=1, vocab_size=vocab_size)
    # Shares are exact at the borders of the blend's blocks: go through it until both fall together.
    num_samples = math.lcm(sum(wanted), opened.phases[0].blend.block_samples)
    seen = np.zeros(vocab_size, dtype=int)
    for rank in range(2):
        for batch in micro_batches(
            opened, 0, 0, global_batch_size=num_samples, micro_batch_size=2, data_parallel_rank=rank,
            data_parallel_size=2,
        ):  # fmt: skip
            labels = batch["labels"][batch["labels"] != -100]
            seen += np.bincount(labels.numpy(), minlength=vocab_size)
    for own, first, times in zip(sizes, firsts, passes, strict=True):
        expected = np.full(own.sum(), times * num_samples // sum(wanted))
        expected[np.cumsum([0, *own[:-1]])] = 0  # nothing foretells the first token of a document
        assert seen[first : first + own.sum()].tolist() == expected.tolist()


def write_word_tokenizer(path, vocab_size: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"</s>": 0, **{f"w{i}": i for i in range(1, vocab_size)}}
    Tokenizer(WordLevel(words, unk_token="</s>")).save(str(path))


def test_every_token_of_every_document_is_predicted_once_a_pass(config):
    """By documents and tokens, not by windows: two whole passes through each source of the first phase."""
    opened = open_data(config)
    for name in ("docs", "speeches"):
        sequences, part = opened.sequences(0, name), opened.sources[name].training
        predicted = np.zeros(part.end, dtype=int)
        wanted = 2 * len(sequences)
        n = 0
        while wanted:
            source, _, window = opened.locate(0, n)
            if source == name:
                begin = sequences.offset(window)
                predicted[begin + 1 : begin + 1 + sequences.seq_length] += 1
                wanted -= 1
            n += 1
        covered = 1 + len(sequences) * sequences.seq_length
        assert part.end - covered < sequences.seq_length, "less than a sequence at the end of a source is left out"
        assert predicted[0] == 0
        assert set(predicted[1:covered].tolist()) == {2}
        assert not predicted[covered:].any()
