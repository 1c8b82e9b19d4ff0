"""Several tokenised sources to one, and the documents of one in another order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_prep.bad_lines import bad_lines_path, write_bad_lines
from hymba_train.data.indexed import IndexedTokens, bin_path, idx_path
from hymba_train.data.indexed_writer import IndexedWriter
from hymba_train.data.manifest import Manifest, manifest_path, read_manifest
from hymba_train.data.permutation import Permutation
from hymba_train.errors import UserError

BLOCK_TOKENS = 2**24


def find_prefixes(given: Sequence[str]) -> list[Path]:
    """Prefixes of tokenised sources: as given, or all below a directory, sorted by name. Raises UserError."""
    prefixes: list[Path] = []
    for item in given:
        path = Path(item)
        if idx_path(path).is_file():
            prefixes.append(path)
        elif path.is_dir():
            found = sorted(index.with_suffix("") for index in path.rglob("*.idx"))
            if not found:
                raise UserError(f"{item} holds no tokenised source (*.idx)")
            prefixes += found
        else:
            raise UserError(f"{item}: no {idx_path(path)}; `hymba data tokenize` writes it")
    return prefixes


def merge_sources(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    *,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    on_block: Callable[[int], None] = lambda tokens: None,
) -> Manifest:
    """Write the documents of all sources, in that order, to one: complete or not at all.

    Args:
        shuffle_seed: put them into a seeded order; None keeps theirs.
        on_block: called with the number of tokens just copied.

    Raises UserError: a missing or damaged source, one without a manifest, other tokenizers or settings than the first
    one's, existing output without ``overwrite``.
    """
    output = Path(output_prefix)
    refuse_to_overwrite(output, overwrite)
    sources = [IndexedTokens(prefix) for prefix in prefixes]
    manifests = [_manifest_of(prefix) for prefix in prefixes]
    _check_alike(prefixes, manifests)
    output.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(output, sources[0].dtype) as writer:
        if shuffle_seed is None:
            for source in sources:
                _copy(source, writer, on_block)
        else:
            _copy_shuffled(sources, writer, shuffle_seed, on_block)
        manifest_path(output).unlink(missing_ok=True)
        files = writer.publish()
    bad_lines = [
        line for prefix in prefixes if bad_lines_path(prefix).is_file()
        for line in bad_lines_path(prefix).read_text().splitlines()
    ]  # fmt: skip
    write_bad_lines(output, bad_lines)
    merged = dataclasses.replace(
        manifests[0],
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        max_token_id=max(manifest.max_token_id for manifest in manifests),
        files=files,
        inputs=[facts for manifest in manifests for facts in manifest.inputs],
        shuffle_seed=shuffle_seed,
        num_empty_documents=sum(manifest.num_empty_documents for manifest in manifests),
        num_bad_lines=sum(manifest.num_bad_lines for manifest in manifests),
    )
    merged.write(output)
    return merged


def refuse_to_overwrite(prefix: Path, overwrite: bool) -> None:
    """Raises UserError if there is output at a prefix, unless ``overwrite``."""
    existing = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists, made from other input or settings: pass --overwrite or another output")


def _manifest_of(prefix: str | Path) -> Manifest:
    manifest = read_manifest(prefix)
    if manifest is None:
        raise UserError(f"{prefix} has no manifest, so its tokenizer is unknown: make it with `hymba data tokenize`")
    return manifest


def _check_alike(prefixes: Sequence[str | Path], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    problems = [
        f"{prefix} holds {manifest.chat['kind']}, whose loss mask cannot be merged: name each as a source of its own "
        "in the blend of one phase"
        for prefix, manifest in zip(prefixes, manifests, strict=True)
        if manifest.chat is not None
    ]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        problems += [
            f"{prefix} has {what} {b}, {prefixes[0]} has {a}: only sources that were made alike can be merged"
            for what, a, b in (
                ("tokenizer", first.tokenizer["sha256"][:12], manifest.tokenizer["sha256"][:12]),
                ("dtype", first.dtype, manifest.dtype),
                ("append_eod", first.append_eod, manifest.append_eod),
            )
            if a != b
        ]
    if problems:
        raise UserError(*problems)


def _copy(source: IndexedTokens, writer: IndexedWriter, on_block: Callable[[int], None]) -> None:
    document = 0
    while document < source.num_documents:
        begin = source.document_start(document)
        end = document + 1  # at least one, however long
        if begin + BLOCK_TOKENS < source.num_tokens:
            end = max(end, source.document_at(begin + BLOCK_TOKENS))
        else:
            end = source.num_documents
        offsets = source.document_offsets(document, end)
        writer.add_documents(source.stored_tokens(begin, int(offsets[-1])), np.diff(offsets))
        on_block(int(offsets[-1]) - begin)
        document = end


def _copy_shuffled(
    sources: Sequence[IndexedTokens], writer: IndexedWriter, seed: int, on_block: Callable[[int], None]
) -> None:
    ends = np.cumsum([source.num_documents for source in sources])
    order = Permutation(int(ends[-1]), "documents", seed) if ends[-1] else []
    for place in range(int(ends[-1])):
        number = order[place]
        which = int(np.searchsorted(ends, number, side="right"))
        source = sources[which]
        document = number - int(ends[which] - source.num_documents)
        tokens = source.stored_tokens(source.document_start(document), source.document_start(document + 1))
        writer.add_documents(tokens, np.array([tokens.size]))
        on_block(tokens.size)
