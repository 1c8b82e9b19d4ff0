"""Look into a tokenised source."""

from __future__ import annotations

from pathlib import Path

from hymba_train.data.indexed import IndexedTokens, bin_path, idx_path
from hymba_train.data.manifest import file_sha256, read_manifest
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import Windows, split_held_out
from hymba_train.errors import UserError


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
    lines += [
        f"tokenizer {manifest.tokenizer['name']}: {manifest.tokenizer['vocab_size']:,} tokens, "
        f"sha256 {manifest.tokenizer['sha256'][:12]}; largest id {manifest.max_token_id}; "
        f"end of document {'appended' if manifest.append_eod else 'not appended'}",
        f"from {len(manifest.inputs)} files with {text_bytes:,} bytes of JSON; {manifest.num_empty_documents} empty "
        f"documents and {len(manifest.bad_lines)} bad lines left out",
    ]
    return lines + [f"bad line {line}" for line in manifest.bad_lines]


def document_text(prefix: str, document: int, tokenizer: str) -> str:
    """Text of one document, special tokens by name."""
    tokens = IndexedTokens(prefix)
    if not 0 <= document < tokens.num_documents:
        raise UserError(f"--document {document}: {prefix} has documents 0..{tokens.num_documents - 1}")
    return Tokenizer.load(tokenizer).decode(tokens.document(document), skip_special=False)


def window_text(prefix: str, window: int, seq_length: int, tokenizer: str) -> str:
    """Text of window number ``window`` of the whole source at one sequence length, special tokens by name."""
    whole, _ = split_held_out(IndexedTokens(prefix), 0.0)
    windows = Windows(whole, seq_length)
    if not 0 <= window < len(windows):
        raise UserError(f"--window {window}: {prefix} has windows 0..{len(windows) - 1} of {seq_length} tokens")
    return Tokenizer.load(tokenizer).decode(windows.read(window), skip_special=False)


def validate(prefix: str) -> list[str]:
    """Read all of a source and compare it with its index and manifest. Raises UserError at the first difference."""
    tokens = IndexedTokens(prefix)
    tokens.verify()
    manifest = read_manifest(prefix)
    if manifest is None:
        return [f"{prefix}: the index is sound; there is no manifest to compare the tokens with"]
    for path in (bin_path(prefix), idx_path(prefix)):
        # By suffix: a renamed source is still the same source.
        expected = next(facts for name, facts in manifest.files.items() if Path(name).suffix == path.suffix)
        actual = file_sha256(path)
        if actual != expected["sha256"]:
            raise UserError(
                f"{path} has sha256 {actual}, its manifest says {expected['sha256']}: copy or tokenise it again"
            )
    return [f"{prefix}: index, sizes and sha256 agree with the manifest"]
