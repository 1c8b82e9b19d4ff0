"""Tokenizer files of an export, and of an import."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hymba_train.convert.hf_config import TokenIds
from hymba_train.convert.published import read_json
from hymba_train.data.chat_template import CHAT_TEMPLATE
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError

VOCABULARY = ("tokenizer.json", "tokenizer.model")
FILES = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
UNKNOWN_NAMES = ("<unk>", "[UNK]", "<|unk|>")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files of a directory as they are, regular files of known names only. Returns their names:
    none if there is no vocabulary among them.

    Raises UserError for what is no tokenizer, and for an ``auto_map``: exports are loaded with trust_remote_code, which
    would run the code that it names.
    """
    found = [name for name in FILES if (source / name).is_file()]
    if not set(found) & set(VOCABULARY):
        return []
    for name in found:
        if name.endswith(".json") and "auto_map" in read_json(source / name):
            raise UserError(
                f"{source / name}: auto_map names code to be run, which is never taken over; remove that key"
            )
    Tokenizer.load(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def write_tokenizer_files(source: Path, target: Path) -> TokenIds:
    """Put the tokenizer at ``source`` (a directory or one file) into an export directory, tokenizer.json always among
    the files. Returns the ids of its special tokens.

    Files that describe the tokenizer to transformers are copied where there are some (an imported model), and written
    where there are none: no token is added to a text, as training data have none in front, and padding is on the left.
    """
    tokenizer = Tokenizer.load(source)
    if source.is_dir():
        copy_tokenizer(source, target)
    else:
        name = "tokenizer.model" if source.suffix == ".model" else "tokenizer.json"
        shutil.copyfile(source, target / name)
    if not (target / "tokenizer.json").is_file():
        _from_sentencepiece(target)
    ids = token_ids(tokenizer)
    if not (target / "tokenizer_config.json").is_file():
        names = {
            "bos_token": None if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
            "eos_token": tokenizer.piece(tokenizer.eod_id),
            "pad_token": tokenizer.piece(ids.pad),
        }
        unknown = next((name for name in UNKNOWN_NAMES if name in _vocabulary(tokenizer)), None)
        names = {key: name for key, name in (names | {"unk_token": unknown}).items() if name is not None}
        _write_json(target / "special_tokens_map.json", names)
        _write_json(target / "tokenizer_config.json", names | {
            "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30, "padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast",
        })  # fmt: skip
    return ids


def write_chat_template(directory: Path) -> None:
    """Put the template that fine-tuning used (hymba_train.data.chat_template) into the tokenizer files of an export."""
    (directory / "chat_template.jinja").unlink(missing_ok=True)  # it would win
    path = directory / "tokenizer_config.json"
    _write_json(path, read_json(path) | {"chat_template": CHAT_TEMPLATE})


def token_ids(tokenizer: Tokenizer) -> TokenIds:
    """Special tokens: where there is none to begin or to pad with, the end-of-document token does it."""
    vocabulary = _vocabulary(tokenizer)
    pad = next((vocabulary[name] for name in PAD_NAMES if name in vocabulary), tokenizer.eod_id)
    return TokenIds(tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id, tokenizer.eod_id, pad)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}


def _from_sentencepiece(directory: Path) -> None:
    from hymba_train.data.convert_tokenizer import write_tokenizer

    added = directory / "added_tokens.json"
    special = json.loads(added.read_text()) if added.is_file() else {}
    names = [name for name, _ in sorted(special.items(), key=lambda item: item[1])]
    write_tokenizer((directory / "tokenizer.model").read_bytes(), directory, names)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
