"""Numbers about tokenised sources: lengths of documents, bytes a token, use of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.manifest import read_manifest
from hymba_train.data.tokenizer import Tokenizer

PERCENTILES = (1, 10, 50, 90, 99)
BLOCK_DOCUMENTS, BLOCK_TOKENS = 2**22, 2**24


def source_stats(prefix: str | Path, seq_lengths: Sequence[int], tokenizer: str | None = None) -> dict[str, Any]:
    """Facts about one source, as plain data. Reads the index; with a tokenizer, every token as well.

    Args:
        seq_lengths: for each, how many documents are longer and what share of the tokens they hold.
        tokenizer: counts the vocabulary's use, and names the most frequent tokens.
    """
    tokens = IndexedTokens(prefix)
    manifest = read_manifest(prefix)
    lengths = document_lengths(tokens)
    stats: dict[str, Any] = {
        "prefix": str(prefix),
        "num_tokens": tokens.num_tokens,
        "num_documents": tokens.num_documents,
        "mean_document_tokens": round(float(lengths.mean()), 1) if lengths.size else 0.0,
        "percentiles_document_tokens": {},
        "longest_document_tokens": int(lengths.max(initial=0)),
        "longer_than": {},
    }
    if lengths.size:
        values = np.percentile(lengths, PERCENTILES, method="lower").astype(int).tolist()
        stats["percentiles_document_tokens"] = dict(zip(PERCENTILES, values, strict=True))
    for seq_length in seq_lengths:
        long = lengths[lengths > seq_length]
        stats["longer_than"][seq_length] = {
            "documents": int(long.size),
            "share_of_tokens": round(float(long.sum(dtype=np.int64)) / max(1, tokens.num_tokens), 4),
        }
    if manifest:
        text_bytes = sum(facts["text_bytes"] for facts in manifest.inputs)
        stats |= {"text_bytes": text_bytes, "bytes_per_token": round(text_bytes / max(1, tokens.num_tokens), 3)}
    if tokenizer is not None:
        stats |= _vocabulary(tokens, Tokenizer.load(tokenizer))
    return stats


def document_lengths(tokens: IndexedTokens) -> np.ndarray:
    """Tokens of each document, int32 [documents]."""
    lengths = np.empty(tokens.num_documents, dtype=np.int32)
    for begin in range(0, tokens.num_documents, BLOCK_DOCUMENTS):
        end = min(begin + BLOCK_DOCUMENTS, tokens.num_documents)
        lengths[begin:end] = np.diff(tokens.document_offsets(begin, end))
    return lengths


def _vocabulary(tokens: IndexedTokens, tokenizer: Tokenizer) -> dict[str, Any]:
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for begin in range(0, tokens.num_tokens, BLOCK_TOKENS):
        block = tokens.stored_tokens(begin, min(begin + BLOCK_TOKENS, tokens.num_tokens))
        counts += np.bincount(block, minlength=tokenizer.vocab_size)[: tokenizer.vocab_size]
    top = np.argsort(-counts, kind="stable")[:10]
    return {
        "vocabulary_used": int((counts > 0).sum()),
        "vocab_size": tokenizer.vocab_size,
        "most_frequent": [[int(i), tokenizer.piece(i), int(counts[i])] for i in top if counts[i]],
    }


def stats_lines(stats: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [
        f"{stats['prefix']}: {stats['num_tokens']:,} tokens in {stats['num_documents']:,} documents"
        + (f", {stats['bytes_per_token']:.2f} bytes a token" if "bytes_per_token" in stats else "")
    ]
    percentiles = ", ".join(f"{p} % {value:,}" for p, value in stats["percentiles_document_tokens"].items())
    lines.append(
        f"  tokens a document: mean {stats['mean_document_tokens']:,}; {percentiles}; "
        f"longest {stats['longest_document_tokens']:,}"
    )
    for seq_length, longer in stats["longer_than"].items():
        lines.append(
            f"  longer than {seq_length}: {longer['documents']:,} documents with {longer['share_of_tokens']:.1%} of "
            "the tokens"
        )
    if "vocabulary_used" in stats:
        top = ", ".join(f"{piece!r} {count:,}" for _, piece, count in stats["most_frequent"])
        used = f"{stats['vocabulary_used']:,} of {stats['vocab_size']:,}"
        lines.append(f"  vocabulary: {used} in use; most frequent {top}")
    return lines
