"""Recall tasks: answers follow from what is in front of them, samples depend on (stream, seed, index) alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import main
from data_prep.recall import write_recall
from hymba_train.config.recall_kinds import KEY_TOKENS, RECALL_KINDS, VALUE_TOKENS
from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from hymba_train.data.build import build_training_data, open_source
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import Windows
from hymba_train.errors import UserError
from hymba_train.evaluation.recall import EVALUATION, NUM_DEPTHS, TRAINING, draw
from hymba_train.evaluation.symbols import ALPHABET, Symbols, choose_symbols
from hymba_train.plan.recall import most_items, num_questions, shortest
from tests.train.tiny_run import tiny_config, write_data

SYMBOLS = Symbols(np.arange(10, 110, 2), np.arange(11, 111, 2), 1, 2, 3, 4, eod=0)


@st.composite
def settings_of_a_task(draw_value):
    kind = draw_value(st.sampled_from(list(RECALL_KINDS)))
    items = draw_value(st.integers(1, 24))
    length = shortest(kind, items) + draw_value(st.integers(0, 60))
    return kind, length, items, draw_value(st.integers(0, 10**6))


def sample(task, stream=EVALUATION, seed=1):
    kind, length, items, index = task
    return draw(stream, seed, kind, length, items, index, SYMBOLS)


def solve(kind: str, context: list[int], question: list[int]) -> list[int]:
    """The next token of an answer, from the tokens in front of it alone: first place where the question was."""
    if kind == "selective_copy":
        said = [t for t in context[: context.index(SYMBOLS.ask)] if t != SYMBOLS.blank]
        return said[len(context) - context.index(SYMBOLS.ask) - 1]
    for i in range(len(context) - len(question)):
        if context[i : i + len(question)] == question:
            return context[i + len(question)]
    raise AssertionError("the question was not in the context")


def question_of(kind: str, context: list[int], place: int) -> list[int]:
    """What must be looked up for the token at ``place`` of an answer."""
    if kind == "mqar":
        return context[-1:]
    return context[len(context) - place - KEY_TOKENS - 1 :]


@settings(max_examples=150, deadline=None)
@given(settings_of_a_task())
def test_every_answer_follows_from_what_is_in_front_of_it(task):
    """Also: asked as often as it should be, from the first occurrence of the key, and not of a question before."""
    kind, _, items, _ = task
    found = sample(task)
    tokens, places = found.tokens.tolist(), np.flatnonzero(found.answers >= 0)
    assert len(set(found.answers[places])) == num_questions(kind, items)
    first = places[0]
    for at in places:
        place = int(at - places[found.answers[places] == found.answers[at]][0])
        context = tokens[:at]
        question = question_of(kind, context, place) if kind != "selective_copy" else []
        assert solve(kind, context, question) == tokens[at]
        if kind != "selective_copy":  # known before anything was asked: no answer is the source of another
            assert solve(kind, tokens[:first] if kind == "mqar" else context, question) == tokens[at]


@settings(max_examples=100, deadline=None)
@given(settings_of_a_task())
def test_without_what_was_said_an_answer_is_not_there(task):
    """Each key comes twice, each value of an answer stands where its key stood first: nothing else gives it away."""
    kind, length, _, _ = task
    found = sample(task)
    assert found.tokens.size == length and found.tokens[-1] == SYMBOLS.eod
    assert (found.tokens[:-1] != SYMBOLS.eod).all()
    answers = found.tokens[found.answers >= 0]
    assert np.isin(answers, SYMBOLS.values).all()
    if kind == "mqar":
        keys, counts = np.unique(found.tokens[np.isin(found.tokens, SYMBOLS.keys)], return_counts=True)
        assert (counts == 2).all() and keys.size == task[2]
        _, counts = np.unique(found.tokens[np.isin(found.tokens, SYMBOLS.values)], return_counts=True)
        assert (counts == 2).all()
    if kind in ("phonebook", "needle"):
        asks = np.flatnonzero(found.tokens == SYMBOLS.ask)
        asked = [tuple(found.tokens[i + 1 : i + 1 + KEY_TOKENS]) for i in asks]
        assert len(set(asked)) == len(asked), "a key that is asked for twice would give its answer away"
        assert (np.diff(np.flatnonzero(found.answers >= 0)[:VALUE_TOKENS]) == 1).all()
    if kind == "selective_copy":
        assert set(answers) <= set(SYMBOLS.values[:ALPHABET])


@settings(max_examples=50, deadline=None)
@given(settings_of_a_task(), st.integers(0, 3))
def test_the_same_index_gives_the_same_sample_and_another_one_another(task, seed):
    kind, length, items, index = task
    one, again = sample(task, seed=seed), sample(task, seed=seed)
    assert (one.tokens == again.tokens).all() and (one.answers == again.answers).all()
    others = [sample((kind, length, items, index + 1), seed=seed), sample(task, seed=seed + 1)]
    others.append(sample(task, stream=TRAINING, seed=seed))
    if (50.0 if kind != "selective_copy" else 16.0) ** items > 1e9:  # else two may be equal by chance
        assert all((one.tokens != other.tokens).any() for other in others)


@pytest.mark.parametrize("kind", RECALL_KINDS)
def test_no_sample_of_an_evaluation_is_among_those_of_training(kind):
    length = 129
    items = min(most_items(kind, length), 12)
    seen = {sample((kind, length, items, i), TRAINING).tokens.tobytes() for i in range(500)}
    held_out = {sample((kind, length, items, i), EVALUATION).tokens.tobytes() for i in range(500)}
    assert len(seen) == len(held_out) == 500 and not seen & held_out


def test_needles_lie_at_the_depth_of_their_bucket():
    length, places = 400, []
    for index in range(NUM_DEPTHS):
        found = sample(("needle", length, 1, index))
        assert found.bucket == index
        places.append(int(np.flatnonzero(found.tokens == SYMBOLS.equals)[0]))
    assert places == sorted(places) and places[0] < 5
    steps = np.diff(places)
    assert steps.min() >= steps.max() - 1, "evenly spread"


def test_distances_of_mqar_follow_a_power_law():
    """Half of the questions come within the square root of the range, roughly; uniform ones would not."""
    found = [sample(("mqar", 500, 4, i)) for i in range(300)]
    distances = np.concatenate([np.flatnonzero(s.answers >= 0) - 8 for s in found]) // 2
    assert np.median(distances) < 60 < np.quantile(distances, 0.9)


@pytest.mark.parametrize("kind", RECALL_KINDS)
def test_the_shortest_sample_is_as_short_as_it_can_be(kind):
    for items in (1, 2, 5):
        sample((kind, shortest(kind, items), items, 0))
        assert most_items(kind, shortest(kind, items)) == items
    with pytest.raises(AssertionError):
        sample((kind, shortest(kind, 5) - 1, 5, 0))


class Pieces:
    """A tokenizer of given pieces."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces, self.vocab_size, self.eod_id, self.bos_id, self.path = pieces, len(pieces), 2, 1, "made up"

    def piece(self, i: int) -> str:
        return self.pieces[i]


def test_symbols_are_ordinary_and_marks_are_bytes_that_text_does_not_have():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"w{i}" for i in range(100)), "[PAD]"]
    s = choose_symbols(Pieces(pieces), 50)
    chosen = [*s.keys, *s.values]
    assert len(set(chosen)) == 50 and all(pieces[i].startswith("w") for i in chosen)
    assert [pieces[i] for i in (s.equals, s.end, s.ask, s.blank)] == ["<0x01>", "<0x02>", "<0x03>", "<0x04>"]
    assert max(chosen) > 340 and min(chosen) < 265, "spread over the vocabulary"
    given_marks = choose_symbols(Pieces(pieces), 50, [259, 260, 261, 262])
    assert (given_marks.equals, given_marks.blank) == (259, 262) and 259 not in given_marks.keys
    for problem in (
        lambda: choose_symbols(Pieces(pieces), 101),
        lambda: choose_symbols(Pieces(pieces), 9, [2, 3, 4, 5]),
    ):
        with pytest.raises(UserError, match=r"evaluation\.recall_s"):
            problem()


def test_without_byte_pieces_the_rarest_ids_are_marks():
    s = choose_symbols(Pieces(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(100))]), 96)
    assert [s.equals, s.end, s.ask, s.blank] == [99, 100, 101, 102]


def test_ids_that_a_tokenizer_skips_are_no_symbols(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel

    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 41) if i not in (7, 30)}}
    Fast(WordLevel(words, unk_token="</s>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.piece(7), tokenizer.piece(8)) == (41, "", "w8")
    s = choose_symbols(tokenizer, 34)
    assert not {7, 30} & {*s.keys, *s.values, s.equals, s.end, s.ask, s.blank}


def test_a_source_of_recall_tasks_is_read_a_whole_document_at_a_time(tmp_path):
    """Blocks of the source are windows of the run: every window holds whole documents, whose answers can be solved."""
    write_data(tmp_path)
    flags = ["recall", "--output", str(tmp_path / "recall"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    flags += ["--tokens", "2e4", "--seq-length", "128", "--num-symbols", "80"]
    assert main(flags) == 0
    before = (tmp_path / "recall.bin").stat().st_mtime_ns
    assert main(flags) == 0 and (tmp_path / "recall.bin").stat().st_mtime_ns == before, "it is there already"
    assert main([*flags, "--seed", "2"]) == 2, "another seed would overwrite it"
    facts = json.loads((tmp_path / "recall.json").read_text())
    assert sum(facts["inputs"][0]["documents"].values()) == facts["num_documents"] and facts["num_tokens"] % 128 == 0
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    source = open_source(DataConfig(path=str(tmp_path)), "recall", SourceConfig(path="recall"), tokenizer)
    assert source.mask is not None and facts["chat"]["kind"] == "recall tasks"
    windows = Windows(source.training, 128)
    for i in range(len(windows)):
        tokens, borders = windows.read(i), windows.borders(i)
        assert tokens[127] == tokenizer.eod_id and borders[-1] == 128
        assert all(tokens[b - 1] == tokenizer.eod_id for b in borders)


def test_loss_is_on_what_can_be_known(tmp_path):
    """Labels of a training sample of such a source are answers and repeats; nothing random, and no text is masked."""
    write_data(tmp_path)
    write_recall(tmp_path / "recall", tmp_path / "tokenizer.json", 30_000, 128, num_symbols=80)
    symbols = choose_symbols(Tokenizer.load(tmp_path / "tokenizer.json"), 80)
    config = tiny_config(tmp_path).data
    config.document_mask = True
    config.sources = {"recall": SourceConfig(path="recall"), "odd": SourceConfig(path="odd")}
    config.phases = {
        "only": PhaseConfig(tokens=20_000, seq_length=128, global_batch_size=8, blend={"recall": 0.8, "odd": 0.2})
    }
    data = build_training_data(config, seed=1, vocab_size=96)
    for number in range(100):
        sample = data.sample(0, number)
        labels, tokens = sample["labels"], sample["tokens"]
        if sample["source"] == "odd":
            assert (labels != -100).mean() > 0.9
            continue
        assert 0 < (labels != -100).sum() < 115 and (labels[labels != -100] == tokens[1:][labels != -100]).all()
        assert not np.isin(labels, [symbols.blank, symbols.equals, symbols.ask, symbols.end, symbols.eod]).any()
        for place in np.flatnonzero(labels != -100):  # each label stands somewhere in front of it, in its document
            begin = place - sample["positions"][place]
            assert labels[place] in tokens[begin : place + 1]
    config.phases["only"].seq_length = 64
    with pytest.raises(UserError, match="seq_length=64 would cut documents of recall, made for sequences of 128"):
        build_training_data(config, seed=1, vocab_size=96)
    config.phases["only"].seq_length, config.document_mask = 128, False
    with pytest.raises(UserError, match="recall tasks must not see one another"):
        build_training_data(config, seed=1, vocab_size=96)


@settings(max_examples=60, deadline=None)
@given(settings_of_a_task())
def test_known_tokens_are_answers_and_repeats_of_the_haystack(task):
    found = sample(task)
    assert (found.known >= (found.answers >= 0)).all()
    if task[0] != "needle":
        assert (found.known == (found.answers >= 0)).all()
        return
    others = found.known & (found.answers < 0)
    hay = [t for t, k in zip(found.tokens, others, strict=True) if k]
    num_marks = int(np.isin(found.tokens, [SYMBOLS.end, SYMBOLS.equals, SYMBOLS.ask]).sum())
    assert num_marks == 3 * task[2] + 2 and others.sum() == task[1] - 9 * task[2] - 9 - 16
    assert all(a == b for a, b in zip(hay, hay[16:], strict=False))
