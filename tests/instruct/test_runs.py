"""Whole runs: pretraining, fine-tuning, DPO, one after the other; every layout as one process; exact resume; export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hymba_train.callbacks.jsonl import read_events
from hymba_train.convert.generate import generate
from hymba_train.convert.load import load_model
from hymba_train.data.answers import Reference
from hymba_train.data.chat_template import CHAT_TEMPLATE, prompt_text
from hymba_train.data.indexed import IndexedTokens
from tests.instruct import tiny
from tests.warm import server

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

LAYOUTS = {
    2: {
        "tp2_sp": {"parallel.tensor": 2, "parallel.sequence": True, "data.phases.only.micro_batch_size": 2},
        "pp2": {"parallel.pipeline": 2},
        "dp2": {
            f"parallel.{key}": True
            for key in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
        },
    },
    4: {
        "tp2_pp2": {"parallel.tensor": 2, "parallel.pipeline": 2},
        "pp2_vpp2_dp2": {
            "parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "data.phases.only.global_batch_size": 4,
        },
    },
}  # fmt: skip
METRICS = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")


def work(directory: Path, *actions: tuple[str, list], processes: int = 1) -> str:
    """Run actions of tests.instruct.worker; returns all output. Fails if it did not exit with 0."""
    path = directory / f"actions{processes}.json"
    path.write_text(json.dumps(actions))
    ranks = processes if processes > 1 else 0
    return server().run(ranks, "tests.instruct.worker", str(path), timeout_seconds=800)


class Runs:
    """Runs on the data in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = ""

    def settings(self, objective: str, name: str, **changes) -> list[str]:
        start = {"pretrain": None, "sft": "pretrain", "dpo": "sft"}[objective]
        load = {"checkpoint.load": f"{self.directory}/runs/{start}", "checkpoint.load_optimizer": False}
        return tiny.overrides(self.directory, objective, **{**(load if start else {}), "run.name": name, **changes})

    def log(self, name: str) -> list[dict]:
        return read_events(self.directory / "runs" / name / "metrics.jsonl", "train")


@pytest.fixture(scope="module")
def runs(instruct) -> Runs:
    """In one process."""
    runs = Runs(instruct)
    (instruct / "choice.reference").write_bytes(b"of pairs that were there before")
    s = runs.settings
    batch_4 = {"data.phases.only.global_batch_size": 4}
    one_step = {"run.train_steps": 1, "checkpoint.enabled": False}
    exported, imported = str(instruct / "exported"), f"{instruct}/runs/imported"
    runs.output = work(
        instruct,
        ("train", s("pretrain", "pretrain")),
        ("train", s("sft", "sft")),
        ("train", s("sft", "sft_halves", **{"run.train_steps": 1})),
        ("train", s("sft", "sft_halves")),
        ("train", s("sft", "sft_batch_4", **batch_4)),
        ("export", [f"{instruct}/runs/sft", exported]),
        ("import", [exported, imported]),
        ("train", s("sft", "from_sft", **one_step, **{"checkpoint.load": f"{instruct}/runs/sft"})),
        ("train", s("sft", "from_imported", **one_step, **{"checkpoint.load": imported})),
        ("reference", s("dpo", "dpo")),
        ("train", s("dpo", "dpo")),
        ("train", s("dpo", "dpo_halves", **{"run.train_steps": 2})),
        ("train", s("dpo", "dpo_halves")),
        ("train", s("dpo", "dpo_batch_4", **batch_4)),
        ("train", s("dpo", "other_start", **{"checkpoint.load": f"{instruct}/runs/pretrain"})),
    )  # fmt: skip
    return runs


def exact(runs: Runs, name: str) -> list[tuple]:
    return [
        (r["step"], r["loss_hex"], r["grad_norm_hex"], r["lr"], r["batch_hash"], *(r.get(m) for m in METRICS))
        for r in runs.log(name)
    ]


def test_fine_tuning_starts_from_the_loaded_weights_and_learns(runs):
    log = runs.log("sft")
    assert [r["step"] for r in log] == [1, 2, 3], "six packed sequences, two a step"
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    answers = sum(r["labelled_tokens"] for r in log)
    manifest = json.loads((runs.directory / "talk.json").read_text())
    assert answers == manifest["chat"]["num_answer_tokens"], "every conversation exactly once"
    assert [r["labelled_tokens"] for r in runs.log("sft_batch_4")][1] == log[2]["labelled_tokens"]


def test_dpo_starts_at_ln_2_and_learns_to_prefer(runs):
    log = runs.log("dpo")
    assert [r["step"] for r in log] == [1, 2, 3, 4], "seven packed sequences, two a step: one row lacks"
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(log[0]["reward_margin"]) < 1e-5
    assert log[-1]["loss"] < 0.5 and log[-1]["reward_margin"] > 0.5 and log[-1]["reward_accuracy"] == 1
    assert sum(r["labelled_tokens"] for r in log) == 14, "pairs are what is counted, each once"


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_resume_is_bit_identical(runs, objective):
    assert exact(runs, f"{objective}_halves") == exact(runs, objective)
    starts = read_events(runs.directory / "runs" / f"{objective}_halves" / "metrics.jsonl", "start")
    assert len(starts) == 2, "it was not resumed"


def test_a_reference_of_another_model_is_refused(runs):
    (line,) = [line for line in runs.output.splitlines() if line.startswith("UserError")]
    assert "choice.reference holds log-probabilities of sft, not of checkpoint.load=" in line
    assert line.endswith("run `hymba reference` again")


def test_the_reference_is_the_exported_model(runs):
    """Log-probabilities of the answers, document by document, from transformers' side of the house."""
    import torch

    model = load_model(runs.directory / "exported").model
    tokens = IndexedTokens(runs.directory / "choice")
    mask = np.fromfile(runs.directory / "choice.mask", np.uint8)
    for document, found in enumerate(Reference(runs.directory / "choice").values):
        ids = torch.from_numpy(tokens.document(document))[None]
        begin = tokens.document_start(document)
        answer = torch.from_numpy(mask[begin + 1 : begin + ids.shape[1]]) == 1
        with torch.no_grad():
            log_probs = model(ids[:, :-1]).logits.float().log_softmax(-1)[0]
        expected = log_probs.gather(1, ids[0, 1:, None])[answer].sum()
        assert found == pytest.approx(expected.item(), rel=1e-4)


def test_the_export_carries_the_template_and_answers(runs):
    transformers = pytest.importorskip("transformers")
    directory = runs.directory / "exported"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "Two and two?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt_text(
        "Two and two?"
    )
    assert "apply_chat_template" in (directory / "README.md").read_text()
    loaded = load_model(directory)
    (answer,) = generate(loaded, ["Two and two?"], max_new_tokens=4, chat=True)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    new = loaded.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert answer and answer.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_an_imported_model_can_be_trained_on(runs):
    """To Hugging Face's format and back: the same start, bit for bit."""
    assert exact(runs, "from_imported") == exact(runs, "from_sft") and len(exact(runs, "from_sft")) == 1


@pytest.fixture(scope="module")
def parallel(runs):
    """Processes -> the runs of all layouts of so many; fine-tuning, reference and DPO under each."""
    done = {}

    def get(processes: int) -> Runs:
        if processes not in done:
            actions = []
            for name, parallel in LAYOUTS[processes].items():
                for objective in ("sft", "dpo"):
                    actions.append(("train", runs.settings(objective, f"{objective}_{name}", **parallel)))
            work(runs.directory, *actions, processes=processes)
            done[processes] = runs
        return done[processes]

    return get


CASES = [
    pytest.param(n, name, objective, marks=[pytest.mark.slow] if n > 2 else [], id=f"{objective}-{name}")
    for n, layouts in LAYOUTS.items()
    for name in layouts
    for objective in ("sft", "dpo")
]


@pytest.mark.parametrize(("processes", "name", "objective"), CASES)
def test_every_layout_equals_one_process(parallel, processes, name, objective):
    runs = parallel(processes)
    single = objective if "global_batch_size" not in str(LAYOUTS[processes][name]) else f"{objective}_batch_4"
    expected, found = runs.log(single), runs.log(f"{objective}_{name}")
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert b["batch_hash"] == a["batch_hash"] and b["labelled_tokens"] == a["labelled_tokens"]
        for key in ("loss", "grad_norm", *(METRICS if objective == "dpo" else ())):
            if key == "reward_accuracy" and a["step"] == 1:
                continue  # policy and reference are equal: the sign of a margin is rounding
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), (b["step"], key)


def reference_under(runs: Runs, processes: int, layouts: dict) -> None:
    expected = Reference(runs.directory / "choice").values
    for name, parallel in layouts.items():
        work(runs.directory, ("reference", runs.settings("dpo", f"ref_{name}", **parallel)), processes=processes)
        found = Reference(runs.directory / "choice")
        np.testing.assert_allclose(found.values, expected, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAYOUTS)
def test_the_reference_is_the_same_under_every_layout(runs, processes):
    before = (runs.directory / "choice.reference").read_bytes()
    try:
        reference_under(runs, processes, LAYOUTS[processes])
    finally:
        (runs.directory / "choice.reference").write_bytes(before)
