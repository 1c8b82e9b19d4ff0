"""One input shard to one .bin/.idx pair, its manifest and the list of its bad lines."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.bad_lines import check_bad_lines, write_bad_lines
from data_prep.chat import ChatSettings, ConversationEncoder
from data_prep.inputs import InputFile
from data_prep.records import Chunk, ShardReader, TokenizedChunk, parse_chunk
from hymba_train import __version__
from hymba_train.data.answers import MaskWriter, mask_path
from hymba_train.data.indexed import bin_path, idx_path, token_dtype
from hymba_train.data.indexed_writer import IndexedWriter
from hymba_train.data.manifest import Manifest, check_spots, file_sha256, manifest_path, read_manifest
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError

HOPELESS_BAD_LINES = 10_000
"""A shard that begins with so many bad lines and no good one is given up."""
FAST_CHUNK_BYTES = 2**22
"""Text of a chunk for gigatoken, which begins every call with an empty cache of words."""
KEPT_BYTES = 31 * 2**20
"""glibc gives memory back when twice the largest mapped block that was ever freed (of at most 32 MB) lies free at the
end of the heap. The memory of every chunk would go, and be taken again page by page: a fifth of the CPU time with
gigatoken. One block freed once, and never touched, makes glibc keep twice KEPT_BYTES."""
CHECKED_CHUNKS, CHECKED_CHARACTERS = 4, 4_000
"""A faster backend is held to the tokenizer's own library on the beginning of one text in every 16 MB, so that a
difference shows on the user's own text as well."""


@dataclass(frozen=True)
class Settings:
    """What decides the output of a shard, apart from the shard.

    Attributes:
        tokenizer: as :meth:`Tokenizer.load` takes it.
        backend: library that encodes; it changes the speed alone.
        max_bad_lines: bad lines of a shard that are passed over and listed; one more is an error. None: any number.
        chat: records are conversations instead of texts; json_key is then a word for them alone.
    """

    tokenizer: str
    json_key: str = "text"
    append_eod: bool = True
    backend: str = "default"
    max_bad_lines: int | None = None
    chat: ChatSettings | None = None


class ChunkTokenizer:
    """What a process does with one chunk."""

    def __init__(self, settings: Settings) -> None:
        # Workers are processes; threads inside each would fight over the same cores. Respect the user's own setting.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        np.empty(KEPT_BYTES, np.uint8)  # freed at once
        self.settings = settings
        self.tokenizer = Tokenizer.load(settings.tokenizer, settings.backend)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self._num_chunks = 0
        self._conversations = settings.chat and ConversationEncoder(settings.chat, self.tokenizer, self.dtype)

    def __call__(self, chunk: Chunk) -> TokenizedChunk:
        if self._conversations:
            return self._conversations(chunk)
        parsed = parse_chunk(chunk, self.settings.json_key)
        tokens, lengths = self.tokenizer.encode_documents(parsed.texts, self.dtype, self.settings.append_eod)
        if parsed.texts and self._num_chunks % CHECKED_CHUNKS == 0:
            self.tokenizer.compare_backends([parsed.texts[chunk.first % len(parsed.texts)][:CHECKED_CHARACTERS]])
        self._num_chunks += 1
        return TokenizedChunk(
            tokens=tokens,
            lengths=lengths,
            num_empty=len(parsed.texts) - lengths.size,
            text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in parsed.texts),
            bad_lines=parsed.bad_lines,
            read_bytes=chunk.read_bytes,
        )

    def map(self, chunks: Iterable[Chunk]) -> Iterator[TokenizedChunk]:
        """In this process, one after another."""
        return map(self, chunks)


def tokenize_shard(
    file: InputFile,
    prefix: Path,
    settings: Settings,
    tokenizer: Tokenizer,
    tokenize_chunks: Callable[[Iterable[Chunk]], Iterator[TokenizedChunk]],
    on_chunk: Callable[[TokenizedChunk], None] = lambda chunk: None,
    allow_empty: bool = True,
) -> Manifest:
    """Tokenise one shard. PREFIX.bin, .idx and .json appear complete or not at all, the manifest last.

    Raises UserError: too many bad lines, unreadable input, storage full, or no document and not ``allow_empty``.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    reader = ShardReader(file, settings.json_key, FAST_CHUNK_BYTES if tokenizer.is_fast else None)
    bad_lines: list[str] = []
    num_empty, text_bytes, max_token_id = 0, 0, -1
    counts: Counter[str] = Counter()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype) as writer, _mask_writer(prefix, settings) as masks:
        for chunk in tokenize_chunks(reader):
            bad_lines += chunk.bad_lines
            check_bad_lines(bad_lines, settings.max_bad_lines)
            num_empty += chunk.num_empty
            text_bytes += chunk.text_bytes
            if chunk.tokens.size:
                max_token_id = max(max_token_id, int(chunk.tokens.max()))
                writer.add_documents(chunk.tokens, chunk.lengths)
            if masks:
                masks.add(chunk.mask)
                counts.update(chunk.counts)
            if len(bad_lines) >= HOPELESS_BAD_LINES and not writer.num_documents + num_empty:
                raise no_document(file, settings.json_key, bad_lines)  # a wrong key, say
            on_chunk(chunk)
        if not writer.num_documents and not allow_empty:
            raise no_document(file, settings.json_key, bad_lines)
        manifest_path(prefix).unlink(missing_ok=True)  # from here on the old manifest would be wrong
        mask_path(prefix).unlink(missing_ok=True)
        chat = None
        if masks:
            chat = {**settings.chat.facts(), **counts, "num_answer_tokens": masks.num_answer_tokens}
            chat["mask"] = masks.publish()
        files = writer.publish()
    write_bad_lines(prefix, bad_lines)
    manifest = Manifest(
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        dtype=str(dtype),
        max_token_id=max_token_id,
        append_eod=settings.append_eod,
        tokenizer=tokenizer_facts(tokenizer),
        files=files,
        inputs=[
            {
                "name": file.name,
                "bytes": reader.num_bytes,
                "sha256": reader.sha256,
                "records": reader.num_records,
                "text_bytes": text_bytes,
            }
        ],
        json_key=settings.json_key,
        num_empty_documents=num_empty,
        num_bad_lines=len(bad_lines),
        backend=tokenizer.backend,
        versions=versions(tokenizer.backend),
        chat=chat,
    )
    manifest.write(prefix)
    return manifest


def _mask_writer(prefix: Path, settings: Settings) -> contextlib.AbstractContextManager[MaskWriter | None]:
    return MaskWriter(prefix) if settings.chat else contextlib.nullcontext()


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "name": tokenizer.path.name,
        "sha256": tokenizer.content_hash,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
    }


def versions(backend: str) -> dict[str, str]:
    """Of Python, of this software and of the packages that made the tokens."""
    packages = {name: _version(name) for name in ("numpy", backend)}
    return {"python": platform.python_version(), "hymba_train": __version__, **packages}


@functools.cache
def _version(package: str) -> str:
    return version(package)


def finished(
    files: list[InputFile], prefix: Path, settings: Settings, tokenizer: Tokenizer, shuffle_seed: int | None = None
) -> Manifest | None:
    """Manifest of output that these inputs and settings have made before; None if there is none, or of others."""
    try:
        manifest = read_manifest(prefix)
    except UserError:
        return None
    if manifest is None or shuffle_seed != manifest.shuffle_seed or len(files) != len(manifest.inputs):
        return None
    allowed = settings.max_bad_lines
    same = (
        manifest.tokenizer == tokenizer_facts(tokenizer)
        and (manifest.json_key, manifest.append_eod) == (settings.json_key, settings.append_eod)
        and _same_chat(manifest, settings, prefix)
        and (allowed is None or manifest.num_bad_lines <= allowed * len(files))
        and all(_is_whole(path, manifest) for path in (bin_path(prefix), idx_path(prefix)))
        and all(file.num_bytes == was["bytes"] for file, was in zip(files, manifest.inputs, strict=True))
    )
    if not same:
        return None
    # Reading the input again costs little beside tokenising it.
    unchanged = all(
        was["name"] == file.name and was["sha256"] == file_sha256(file.path)
        for file, was in zip(files, manifest.inputs, strict=True)
    )
    return manifest if unchanged else None


def _same_chat(manifest: Manifest, settings: Settings, prefix: Path) -> bool:
    if settings.chat is None or manifest.chat is None:
        return settings.chat is None and manifest.chat is None
    wanted = settings.chat.facts()
    same = wanted == {key: manifest.chat.get(key) for key in wanted}
    return same and _agrees(mask_path(prefix), manifest.chat["mask"])


def _is_whole(path: Path, manifest: Manifest) -> bool:
    return _agrees(path, manifest.file(path.suffix))


def _agrees(path: Path, facts: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    try:
        check_spots(path, facts)
    except UserError:
        return False
    return True


def no_document(file: InputFile, json_key: str, bad_lines: list[str]) -> UserError:
    """The error for a shard without a document; it shows the first bad line, which often says why."""
    first = f"; {len(bad_lines)} bad lines, the first is {bad_lines[0]}" if bad_lines else ""
    return UserError(f"{file.path}: no document with any text under {json_key!r}{first}")
