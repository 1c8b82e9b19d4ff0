"""What a plan of fine-tuning refuses: one line that names the key and what to do."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest

from hymba_train.config import compose
from hymba_train.data.answers import write_reference
from hymba_train.data.build import build_training_data
from hymba_train.data.manifest import read_manifest
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.errors import UserError
from hymba_train.plan import make_plan
from hymba_train.plan.instruct import fill_in_epochs
from tests.instruct import tiny


@pytest.fixture
def copy(instruct, tmp_path):
    """The prepared data, to be damaged; a directory stands for the start model."""
    shutil.copytree(instruct, tmp_path / "data", ignore=shutil.ignore_patterns("runs", "exported", "*.reference"))
    (tmp_path / "data" / "start").mkdir()
    return tmp_path / "data"


def problems(directory, objective: str, **changes) -> list[str]:
    load = {"checkpoint.load": str(directory / "start")}
    with pytest.raises(UserError) as error:
        make_plan(compose(tiny.overrides(directory, objective, **{**load, **changes})), 1)
    return list(error.value.problems)


def one_problem(*args, **changes) -> str:
    (problem,) = problems(*args, **changes)
    return problem


def test_an_epoch_is_as_long_as_the_packing(copy):
    config = compose(tiny.overrides(copy, "sft"))
    plan = make_plan(config, 1)
    assert plan.steps.num_steps == 3 and config.data.phases["only"].tokens == 6 * tiny.SEQ_LENGTH
    plan = make_plan(compose(tiny.overrides(copy, "sft", **{"data.phases.only.epochs": 2})), 1)
    assert plan.steps.num_steps == 6
    plan = make_plan(compose(tiny.overrides(copy, "sft", **{"data.phases.only.global_batch_size": 4})), 1)
    assert plan.steps.num_steps == 2, "the last batch is filled up, not left out"


def test_plain_text_is_no_conversation(copy):
    changes = {
        "data.sources.plain.path": "plain",
        "data.phases.only.blend": {"plain": 1.0},
        "data.phases.only.epochs": None,
    }
    changes |= {"data.phases.only.packing": "concat", "data.phases.only.tokens": 8 * tiny.SEQ_LENGTH}
    line = one_problem(copy, "sft", **changes)
    assert line.startswith("data.sources.plain.path=plain: run.objective=sft needs conversations with a loss mask")
    assert line.endswith("make them with `hymba data chat`")


def test_conversations_are_no_pairs_and_no_plain_text(copy):
    assert one_problem(copy, "sft", **{"run.objective": "dpo"}).endswith("make them with `hymba data chat --pairs`")
    assert "set run.objective=sft" in one_problem(copy, "sft", **{"run.objective": "pretrain"})


def test_a_missing_mask(copy):
    (copy / "talk.mask").unlink()
    assert "no " in (line := one_problem(copy, "sft")) and "talk.mask, the loss mask; run `hymba data chat`" in line


def test_another_mask_of_the_same_size(copy):
    content = bytearray((copy / "talk.mask").read_bytes())
    content[77] ^= 1
    (copy / "talk.mask").write_bytes(content)
    line = one_problem(copy, "sft")
    assert line.startswith("data.sources.talk.path=talk: ")
    assert line.endswith("talk.mask is not the loss mask of its manifest; run `hymba data chat` again, or copy both")


def test_dpo_needs_reference_and_start(copy):
    line = one_problem(copy, "dpo")
    assert (
        line.startswith("data.sources.choice.path=choice: no ") and "run `hymba reference` with the overrides" in line
    )
    assert make_plan(
        compose(tiny.overrides(copy, "dpo", **{"checkpoint.load": str(copy / "start")})), 1, needs_reference=False
    ).steps
    (copy / "choice.reference").write_bytes(b"")
    assert one_problem(copy, "dpo", **{"checkpoint.load": None}).startswith("checkpoint.load: to be given")


def test_another_tokenizer(copy):
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    line = one_problem(copy, "sft")
    assert (
        "mask were made with another tokenizer than data.tokenizer=tokenizer; set that, or run `hymba data chat`"
        in line
    )


def test_a_missing_packing(copy):
    (copy / f"talk.best_fit-{tiny.SEQ_LENGTH}.pack").unlink()
    assert "make it once, offline: `hymba data pack`" in one_problem(copy, "sft")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data.phases.only.packing": "concat"}, "data.phases.only.epochs=1 needs a packing"),
        ({"data.phases.only.rampup_batch_size": [1, 1, 384]}, "data.phases.only.rampup_batch_size: not in a phase"),
        ({"data.document_mask": False}, "data.document_mask=false: run.objective=sft packs conversations"),
        ({"data.phases.only.epochs": 0}, "data.phases.only.epochs=0: must be at least 1"),
        ({"run.objective": "rlhf"}, "run.objective=rlhf: not one of pretrain, sft, dpo"),
        ({"optim.dpo_beta": 0}, "optim.dpo_beta=0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_be(copy, changes, line):
    assert any(problem.startswith(line) for problem in problems(copy, "sft", **changes))


def build(directory, objective: str, **changes):
    load = {"checkpoint.load": str(directory / "start")}
    config = compose(tiny.overrides(directory, objective, **{**load, **changes}))
    fill_in_epochs(config)
    return build_training_data(config.data, seed=5, vocab_size=tiny.VOCAB)


def test_held_out_conversations_are_judged_by_their_answers(copy):
    changes = {"data.sources.talk.validation_fraction": 0.3, "data.validation_sequences": 2}
    assert tiny.data_command("pack", "--overwrite", *tiny.overrides(copy, "sft", **changes)) == 0
    data = build(copy, "sft", **changes)
    part, mask = data.sources["talk"].held_out, data.sources["talk"].mask
    sample = data.validation_sample("talk", tiny.SEQ_LENGTH, 0)
    expected = mask.tokens(part.begin + 1, part.begin + 1 + tiny.SEQ_LENGTH)
    assert (sample["labels"] != IGNORED_LABEL).tolist() == (expected == 1).tolist()
    assert 0 < expected.sum() < 100


@pytest.mark.parametrize(
    ("objective", "changes", "line"),
    [
        ("sft", {"data.phases.only.tokens": 384}, "data.phases.only.tokens=384: 1 epochs of its packed"),
        ("sft", {"data.phases.only.packing": "concat", "data.phases.only.tokens": 768, "data.phases.only.epochs": None},
         "data.phases.only.packing=concat would cut the conversations of talk"),
        ("sft", {"data.document_mask": False}, "data.document_mask=false: conversations must not see one another"),
        ("dpo", {"data.sources.choice.validation_fraction": 0.2}, "data.sources.choice.validation_fraction=0.2: pairs"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_opened(copy, objective, changes, line):
    with pytest.raises(UserError) as error:
        build(copy, objective, **changes)
    assert error.value.problems[0].startswith(line)


def test_a_conversation_is_never_cut(copy):
    changes = {"data.phases.only.seq_length": 96}
    assert tiny.data_command("pack", *tiny.overrides(copy, "sft", **changes)) == 0
    with pytest.raises(UserError, match=r"are longer than the phase's seq_length=96 and would be cut"):
        build(copy, "sft", **changes)


def test_a_reference_for_other_tokens_is_refused(copy):
    write_reference(copy / "choice", np.zeros(28, np.float32), {"source": "other", "checkpoint": "", "name": ""})
    with pytest.raises(UserError, match=r"choice\.reference was made for another .*choice\.bin: run `hymba reference`"):
        build(copy, "dpo")
    assert tiny.data_command("pack", "--overwrite", *tiny.overrides(copy, "dpo")) == 0, "packs need none"
    (copy / "choice.reference").write_bytes((copy / "choice.reference").read_bytes()[1:])
    with pytest.raises(UserError, match=r"is not a whole reference file"):
        build(copy, "dpo")


def test_an_epoch_shows_every_sequence_of_every_source_once(copy, instruct):
    """Whatever the weights say, and however unequal the sources."""
    tiny.write_jsonl(copy / "more.jsonl", tiny.conversations()[:7])
    more = ["--output-dir", copy, "--seq-length", tiny.SEQ_LENGTH, "--tokenizer", copy / "tokenizer", "--quiet"]
    assert tiny.data_command("chat", "--input", copy / "more.jsonl", *more) == 0
    changes = {
        "data.sources.more.path": "more", "data.phases.only.blend": {"talk": 1.0, "more": 5.0},
        "data.phases.only.epochs": 2, "data.phases.only.global_batch_size": 5,
    }  # fmt: skip
    assert tiny.data_command("pack", *tiny.overrides(copy, "sft", **changes)) == 0
    data = build(copy, "sft", **changes)
    phase = data.phases[0]
    samples = [data.sample(0, n) for n in range(20)]
    seen = Counter((s["source"], s["window"]) for s in samples[: phase.num_samples])
    assert seen == Counter({(name, w): 2 for name, n in (("talk", 6), ("more", 2)) for w in range(n)})
    assert phase.num_samples == 16 and not any((s["labels"] != IGNORED_LABEL).any() for s in samples[16:])
    single = Counter((s["source"], s["window"]) for s in samples[:8])
    assert set(single.values()) == {1}, "the first epoch ends before the second begins"


def test_another_mask_is_other_data(copy):
    """A run does not go on with another one unnoticed."""
    before = read_manifest(copy / "talk")
    changed = read_manifest(copy / "talk")
    changed.chat["mask"]["sha256"] = "0" * 64
    assert changed.content_hash != before.content_hash
    assert build(copy, "sft").identity()["sources"]["talk"]["files"] == before.content_hash
