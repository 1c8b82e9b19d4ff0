"""Look into a tokenised source: facts, documents, and whether every byte is what it should be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from hymba_train.data.answers import LossMask, mask_path
from hymba_train.data.indexed import IndexedTokens, bin_path, idx_path
from hymba_train.data.manifest import Manifest, file_sha256, read_manifest
from hymba_train.data.packs import verify_packs
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import Windows, split_held_out
from hymba_train.errors import UserError

BLOCK_TOKENS = 2**24
ANSWER_BEGIN, ANSWER_END = "\u27e6", "\u27e7"
"""Around what carries loss, in a source of conversations."""


def summary(prefix: str) -> list[str]:
    """Lines with the facts about a .bin/.idx pair."""
    tokens = IndexedTokens(prefix)
    mean = tokens.num_tokens / max(1, tokens.num_documents)
    lines = [
        f"{prefix}: {tokens.num_tokens:,} tokens ({tokens.dtype}) in {tokens.num_documents:,} documents, "
        f"{mean:,.1f} tokens a document"
    ]
    manifest = read_manifest(prefix)
    if manifest is None:
        return [*lines, "no manifest: written by other software"]
    text_bytes = sum(source["text_bytes"] for source in manifest.inputs)
    if manifest.chat is not None:
        lines.append(
            f"{manifest.chat['kind']}: {manifest.chat['num_answer_tokens']:,} tokens carry loss; for sequences of "
            f"{manifest.chat['seq_length']}, {manifest.chat['num_too_long']:,} longer ones left out, "
            f"{manifest.chat['num_cut']:,} cut"
        )
    return [
        *lines,
        f"tokenizer {manifest.tokenizer['name']}: {manifest.tokenizer['vocab_size']:,} tokens, "
        f"sha256 {manifest.tokenizer['sha256'][:12]}; largest id {manifest.max_token_id}; "
        f"end of document {'appended' if manifest.append_eod else 'not appended'}; encoded by {manifest.backend}",
        f"from {len(manifest.inputs)} files with {text_bytes:,} bytes of text, "
        f"{text_bytes / max(1, manifest.num_tokens):.2f} bytes a token; {manifest.num_empty_documents} empty documents "
        f"and {manifest.num_bad_lines} bad lines left out"
        + (f" (listed in {prefix}.bad_lines.txt)" if manifest.num_bad_lines else ""),
    ]


def document_text(prefix: str, document: int, tokenizer: str) -> str:
    """Text of one document, special tokens by name, what carries loss between brackets."""
    tokens, manifest = IndexedTokens(prefix), read_manifest(prefix)
    if not 0 <= document < tokens.num_documents:
        raise UserError(f"--document {document}: {prefix} has documents 0..{tokens.num_documents - 1}")
    loaded = Tokenizer.load(tokenizer)
    if manifest is None or manifest.chat is None:
        return loaded.decode(tokens.document(document), skip_special=False)
    mask = LossMask(prefix, manifest.chat["mask"])
    places = tokens.document_start(document), tokens.document_start(document + 1)
    return marked_text(tokens.tokens(*places), mask.tokens(*places) == 1, loaded)


def marked_text(tokens: np.ndarray, carries_loss: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text of tokens [n] with brackets around those that carry loss (bool [n])."""
    changes = np.flatnonzero(carries_loss[1:] != carries_loss[:-1]) + 1
    text = ""
    for begin, end in pairwise([0, *changes.tolist(), tokens.size]):
        part = tokenizer.decode(tokens[begin:end].tolist(), skip_special=False)
        text += f"{ANSWER_BEGIN}{part}{ANSWER_END}" if end > begin and carries_loss[begin] else part
    return text


def window_text(prefix: str, window: int, seq_length: int, tokenizer: str) -> str:
    """Text of window number ``window`` of the whole source at one sequence length, special tokens by name."""
    whole, _ = split_held_out(IndexedTokens(prefix), 0.0)
    windows = Windows(whole, seq_length)
    if not 0 <= window < len(windows):
        raise UserError(f"--window {window}: {prefix} has windows 0..{len(windows) - 1} of {seq_length} tokens")
    return Tokenizer.load(tokenizer).decode(windows.read(window), skip_special=False)


def validate(prefix: str | Path) -> list[str]:
    """Read all of a source, and of the packings beside it, and compare them with index, manifest and trailers.

    Raises UserError at the first difference, naming file and offset.
    """
    prefix = str(prefix)
    tokens = IndexedTokens(prefix)
    tokens.verify()
    manifest = read_manifest(prefix)
    largest = _check_ids(tokens, manifest.tokenizer["vocab_size"] if manifest else None)
    lines = [f"{prefix}: the index is sound; there is no manifest to compare the tokens with"]
    if manifest is not None:
        for path in (bin_path(prefix), idx_path(prefix)):
            expected, actual = manifest.file(path.suffix)["sha256"], file_sha256(path)
            if actual != expected:
                raise UserError(f"{path} has sha256 {actual}, its manifest says {expected}: copy or tokenise it again")
        if largest != manifest.max_token_id:
            raise UserError(f"{prefix}.json says the largest id is {manifest.max_token_id}, it is {largest}")
        lines = [f"{prefix}: index, ids, sizes and sha256 agree with the manifest"]
        if manifest.chat is not None:
            lines.append(_validate_mask(prefix, tokens, manifest))
    for path in sorted(Path(prefix).parent.glob(f"{Path(prefix).name}.*.pack")):
        facts = verify_packs(path)
        if facts["idx_sha256"] != file_sha256(idx_path(prefix)):
            raise UserError(f"{path} was built for another {idx_path(prefix)}: build it again with `hymba data pack`")
        lines.append(f"{path}: sha256 agrees with its trailer, and it belongs to this index")
    return lines


def _validate_mask(prefix: str, tokens: IndexedTokens, manifest: Manifest) -> str:
    path, facts = mask_path(prefix), manifest.chat["mask"]
    LossMask(prefix, facts)  # it is there, and as long as the manifest says
    if facts["bytes"] != tokens.num_tokens or file_sha256(path) != facts["sha256"]:
        raise UserError(f"{path} is not the mask that {prefix}.json describes: copy it, or run `hymba data chat` again")
    if tokens.num_documents % manifest.documents_per_piece:
        raise UserError(f"{prefix} has {tokens.num_documents} documents, no pairs: run `hymba data chat` again")
    return f"{path}: sha256 agrees with the manifest, a byte a token"


def _check_ids(tokens: IndexedTokens, vocab_size: int | None) -> int:
    """Largest id. Raises UserError at the first that is negative or outside the vocabulary."""
    largest = -1
    for begin in range(0, tokens.num_tokens, BLOCK_TOKENS):
        block = tokens.stored_tokens(begin, min(begin + BLOCK_TOKENS, tokens.num_tokens))
        largest = max(largest, int(block.max()))
        if int(block.min()) < 0 or (vocab_size is not None and largest >= vocab_size):
            bad = block < 0 if vocab_size is None else (block < 0) | (block >= vocab_size)
            place = begin + int(np.argmax(bad))
            raise UserError(
                f"{tokens.prefix}.bin: token {place} (byte {place * tokens.dtype.itemsize}) is "
                f"{block[place - begin]}, outside the vocabulary of {vocab_size}: copy or tokenise it again"
            )
    return largest
