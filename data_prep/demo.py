"""The bundled corpus as a ready data set: a tokenizer of 4096 pieces and four tokenised domains. Needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.tokenize_corpus import tokenize_files
from data_prep.train_tokenizer import train_sentencepiece
from hymba_train.data.convert_tokenizer import write_tokenizer
from hymba_train.data.manifest import MANIFEST_VERSION, file_sha256, manifest_path
from hymba_train.data.user_files import write_or_refuse

CORPUS = Path(__file__).parent / "corpus"
DOMAINS = ("books", "speeches", "docs", "code")
VOCAB_SIZE = 4096
HELD_OUT_SHARE = 0.05
"""The tokenizer sees no document that sources.*.validation_fraction up to this share holds out."""
DONE = "demo.json"


def prepare_demo(output: str | Path) -> bool:
    """Make ``output``/tokenizer/ and ``output``/{books,speeches,docs,code}.{bin,idx,json}.

    The same corpus and libraries give the same bytes. Returns False, at once, when everything is there already and
    matches the hashes in demo.json; True when it was made.
    """
    directory = Path(output)
    corpus = {domain: file_sha256(CORPUS / f"{domain}.jsonl") for domain in DOMAINS}
    if _is_complete(directory, corpus):
        return False
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DONE).unlink(missing_ok=True)
    texts = [text for domain in DOMAINS for text in _training_texts(CORPUS / f"{domain}.jsonl")]
    write_tokenizer(train_sentencepiece(texts, VOCAB_SIZE), directory / "tokenizer")
    for domain in DOMAINS:
        manifest_path(directory / domain).unlink(missing_ok=True)  # else what is damaged would be taken for done
        tokenize_files(
            [CORPUS / f"{domain}.jsonl"], directory / domain, directory / "tokenizer", max_bad_lines=0, overwrite=True
        )
    made = [Path("tokenizer", name) for name in ("tokenizer.json", "tokenizer.model")]
    made += [Path(f"{domain}.{suffix}") for domain in DOMAINS for suffix in ("bin", "idx", "json")]
    facts = {
        "manifest_version": MANIFEST_VERSION,
        "corpus": corpus,
        "vocab_size": VOCAB_SIZE,
        "files": {path.as_posix(): file_sha256(directory / path) for path in made},
    }
    write_or_refuse(directory / DONE, json.dumps(facts, indent=1).encode() + b"\n")
    return True


def _is_complete(directory: Path, corpus: dict[str, str]) -> bool:
    try:
        facts: dict[str, Any] = json.loads((directory / DONE).read_bytes())
        return (
            facts["manifest_version"] == MANIFEST_VERSION
            and facts["corpus"] == corpus
            and facts["vocab_size"] == VOCAB_SIZE
            and all(file_sha256(directory / name) == digest for name, digest in facts["files"].items())
        )
    except (OSError, ValueError, KeyError):
        return False  # nothing there, or not whole: make it again


def _training_texts(path: Path) -> list[str]:
    """Texts in front of the held-out last documents (by bytes; rounded up, as the held-out split is by tokens)."""
    with open(path, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    left = HELD_OUT_SHARE * 1.5 * sum(len(text.encode()) for text in texts)
    while texts and left > 0:
        left -= len(texts.pop().encode())
    return texts
