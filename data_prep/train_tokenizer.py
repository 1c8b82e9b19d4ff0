"""Train a BPE tokenizer of Llama's form: byte fallback, single digits, white space kept, newlines as bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.bad_lines import check_bad_lines
from data_prep.inputs import find_inputs
from data_prep.records import ShardReader, parse_chunk
from hymba_train.data.convert_tokenizer import write_tokenizer
from hymba_train.errors import UserError

# <unk>, <s>, </s> and one piece a byte.
NUM_FIXED_PIECES = 3 + 256


def train_sentencepiece(texts: Iterator[str] | Sequence[str], vocab_size: int) -> bytes:
    """SentencePiece BPE model (content of the .model file) with ids <unk> 0, <s> 1, </s> 2, bytes 3..258.

    The same texts give the same bytes. All texts are held in memory: train on a sample of a large corpus.

    Raises UserError when the texts cannot fill the vocabulary.
    """
    from sentencepiece import SentencePieceTrainer

    if vocab_size <= NUM_FIXED_PIECES:
        raise UserError(f"--vocab-size {vocab_size}: special tokens and bytes alone take {NUM_FIXED_PIECES}")
    model = io.BytesIO()
    # Newlines and tabs become byte pieces (tab is SentencePiece's own separator and cannot be inside a sentence).
    sentences = (line for text in texts for line in re.split(r"[\n\t]+", text) if line)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            character_coverage=0.9999,
            max_sentence_length=2**30,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=1,
        )
    except (RuntimeError, StopIteration) as error:
        reason = str(error).splitlines()[-1] if str(error) else "there is no text"
        raise UserError(f"SentencePiece cannot train {vocab_size} pieces: {reason}") from error
    return model.getvalue()


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    json_key: str = "text",
    max_bad_lines: int | None = None,
) -> list[str]:
    """Train on JSON lines or Parquet and write tokenizer.model and tokenizer.json (same ids) into directory ``output``.

    Returns the bad lines that were passed over, as "file:line: reason".

    Raises UserError: missing files, more bad lines in a shard than ``max_bad_lines``, or too little text.
    """
    texts, bad_lines = _texts(inputs, json_key, max_bad_lines)
    write_tokenizer(train_sentencepiece(texts, vocab_size), output)
    return bad_lines


def _texts(inputs: Sequence[str | Path], json_key: str, max_bad_lines: int | None) -> tuple[list[str], list[str]]:
    texts: list[str] = []
    all_bad: list[str] = []
    for file in find_inputs(inputs):
        bad_lines: list[str] = []
        for chunk in ShardReader(file, json_key):
            parsed = parse_chunk(chunk, json_key)
            bad_lines += parsed.bad_lines
            check_bad_lines(bad_lines, max_bad_lines)
            texts += parsed.texts
        all_bad += bad_lines
    return texts, all_bad
