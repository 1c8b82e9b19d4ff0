"""Conversations and pairs of real form, small, and a run on them: for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import data_prep.cli
from data_prep.demo import CORPUS, DOMAINS
from data_prep.train_tokenizer import train_sentencepiece
from hymba_train.data.convert_tokenizer import write_tokenizer

VOCAB = 384
SEQ_LENGTH = 384

SYSTEM = {"role": "system", "content": "Answer in one word. "}
QUESTIONS = [
    "What is the capital of France?",
    " Name a colour.",
    "Two and two?",
    "Say <s> and </s>.",
    "Is \u00e9 a letter?",
]
ANSWERS = ["Paris", "red\n\nor blue ", "4", "<s> </s>", "yes"]


def conversations() -> list[dict]:
    """Twenty records: one turn and several, with and without system text, in both forms."""
    records = []
    for number in range(20):
        question, answer = QUESTIONS[number % 5], f"{ANSWERS[number % 5]} {'ab' * (number % 3)}"
        if number % 4 == 3:
            records.append({"prompt": question, "completion": answer})
            continue
        messages = [SYSTEM] if number % 2 else []
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if number % 4 == 2:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes!"}]
        records.append({"messages": messages})
    return records


def pairs() -> list[dict]:
    """Fourteen pairs, in the three forms."""
    records = []
    for number in range(14):
        question, good, bad = QUESTIONS[number % 5], ANSWERS[number % 5], ANSWERS[(number + 1) % 5] + "?" * number
        if number % 3 == 0:
            records.append({"prompt": question, "chosen": good, "rejected": bad})
            continue
        asked = [{"role": "user", "content": question}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (good, bad))
        if number % 3 == 1:
            records.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
        else:
            records.append({"prompt": question, "chosen": asked + chosen, "rejected": asked + rejected})
    return records


def write_jsonl(path: Path, records: list) -> None:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records), encoding="utf-8")


def write_tiny_tokenizer(directory: Path) -> None:
    """A tokenizer of the form of the published one, trained on the bundled corpus."""
    texts = [json.loads(line)["text"] for name in DOMAINS[:1] for line in (CORPUS / f"{name}.jsonl").open()]
    write_tokenizer(train_sentencepiece([texts[0][:200_000]], VOCAB), directory)


def data_command(*arguments) -> int:
    return data_prep.cli.main([str(a) for a in arguments])


def prepare(directory: Path) -> None:
    """Tokenizer, sources ``talk`` and ``choice`` with their packings, and plain text ``plain``, in ``directory``."""
    write_tiny_tokenizer(directory / "tokenizer")
    write_jsonl(directory / "talk.jsonl", conversations())
    write_jsonl(directory / "choice.jsonl", pairs())
    write_jsonl(directory / "plain.jsonl", [{"text": f"Line {i}. " * 30} for i in range(20)])
    common = ["--tokenizer", directory / "tokenizer", "--workers", 1, "--quiet"]
    chat = [*common, "--output-dir", directory, "--seq-length", SEQ_LENGTH]
    assert data_command("chat", "--input", directory / "talk.jsonl", *chat) == 0
    assert data_command("chat", "--input", directory / "choice.jsonl", "--pairs", *chat) == 0
    assert (
        data_command("tokenize", "--input", directory / "plain.jsonl", "--output-prefix", directory / "plain", *common)
        == 0
    )
    for objective in ("sft", "dpo"):
        assert data_command("pack", *overrides(directory, objective)) == 0


MODEL = {
    "name": "tiny", "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
    "num_query_groups": 2, "vocab_size": VOCAB, "global_layers": [0, 3], "kv_groups": [[1, 2]], "window_size": 8,
    "num_meta_tokens": 4, "mamba_state_dim": 4, "mamba_dt_rank": 4, "make_vocab_size_divisible_by": 16,
    "rope_type": "default", "rope_original_max_positions": 384,
}  # fmt: skip


def overrides(directory: Path, objective: str, **changes) -> list[str]:
    """Overrides of a run on the data in ``directory``: pretrain | sft | dpo."""
    source = {"pretrain": "plain", "sft": "talk", "dpo": "choice"}[objective]
    phase = {"seq_length": SEQ_LENGTH, "global_batch_size": 2, "blend": {source: 1.0}}
    phase |= {"tokens": 8 * SEQ_LENGTH} if objective == "pretrain" else {"epochs": 1, "packing": "best_fit"}
    keys = {
        **{f"model.{key}": value for key, value in MODEL.items()},
        "precision.params": "float32", "optim.lr": 0.005, "optim.min_lr": 0.0, "optim.adam_eps": 1e-5,
        "schedule.lr_decay_style": "cosine", "data.path": str(directory), "data.tokenizer": "tokenizer",
        f"data.sources.{source}.path": source, "data.phases.only": phase, "run.objective": objective,
        "run.name": objective, "run.directory": str(directory / "runs"), "run.device": "cpu",
        "checkpoint.save_interval": 0, "checkpoint.async_save": False, "logging.log_interval": 1,
        "logging.tensorboard": False, "logging.batch_hash": True, "parallel.world_size": None, **changes,
    }  # fmt: skip
    return ["model=hymba_tiny", *(f"{key}={_hydra(value)}" for key, value in keys.items())]


def _hydra(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_hydra(v)}" for k, v in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
