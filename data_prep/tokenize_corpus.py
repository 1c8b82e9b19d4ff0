"""JSON lines to a .bin/.idx pair and its manifest.

Documents are tokenised one by one (Llama-form BPE slows down on long texts), by several processes that each take a
chunk of lines; the parent writes the results in the order of the input. So the files do not depend on the number of
workers.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_prep.jsonl import CHUNK_BYTES, Chunk, JsonlReader, parse_chunk
from hymba_train.data.indexed import IndexedTokens, IndexedWriter, bin_path, idx_path, token_dtype
from hymba_train.data.manifest import Manifest, manifest_path
from hymba_train.data.permutation import Permutation
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError

MAX_BAD_LINES_SHOWN = 20


@dataclass
class TokenizedChunk:
    tokens: np.ndarray
    """All documents end to end, in the type of the file."""
    lengths: np.ndarray
    """Tokens of each document."""
    num_empty: int
    text_bytes: int
    bad_lines: list[str]
    read_bytes: int


class ChunkTokenizer:
    """What a worker does with one chunk."""

    def __init__(self, tokenizer_path: str, json_key: str, append_eod: bool) -> None:
        # Workers are processes; threads inside each would fight over the same cores. Respect the user's own setting.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.tokenizer = Tokenizer.load(tokenizer_path)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.json_key, self.append_eod = json_key, append_eod

    def __call__(self, chunk: Chunk) -> TokenizedChunk:
        parsed = parse_chunk(chunk, self.json_key)
        encoded = [ids for ids in self.tokenizer.encode_batch(parsed.texts) if ids]
        num_empty = len(parsed.texts) - len(encoded)
        if self.append_eod:
            for ids in encoded:
                ids.append(self.tokenizer.eod_id)
        documents = [np.array(ids, dtype=self.dtype) for ids in encoded]
        return TokenizedChunk(
            tokens=np.concatenate(documents or [np.empty(0, self.dtype)]),
            lengths=np.array([document.size for document in documents], dtype=np.int32),
            num_empty=num_empty,
            text_bytes=sum(len(text.encode()) for text in parsed.texts),
            bad_lines=parsed.bad_lines,
            read_bytes=chunk.read_bytes,
        )


_worker: ChunkTokenizer


def _start_worker(*args: object) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: one message, not one a worker
    _worker = ChunkTokenizer(*args)  # type: ignore[arg-type]


def _run_worker(chunk: Chunk) -> TokenizedChunk:
    return _worker(chunk)


def _tokenized_chunks(
    reader: JsonlReader, make: tuple[str, str, bool], num_workers: int
) -> Iterator[TokenizedChunk]:
    """Results in the order of the input, with a bounded number of chunks in memory."""
    num_workers = min(num_workers, 1 + reader.stored_bytes // CHUNK_BYTES)
    if num_workers == 1:
        yield from map(ChunkTokenizer(*make), reader)
        return
    # spawn: forking a process that has run a tokenizers thread pool can hang.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, make)
    pending: deque[Future[TokenizedChunk]] = deque()
    try:
        for chunk in reader:
            pending.append(pool.submit(_run_worker, chunk))
            if len(pending) > 3 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a tokenizing process died (out of memory, or the error above): try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def tokenize_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    num_workers: int = 1,
    skip_bad_lines: int = 0,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Manifest:
    """Tokenise JSON lines into PREFIX.bin, PREFIX.idx and PREFIX.json.

    The three files appear complete or not at all, the manifest last.

    Args:
        inputs: .jsonl or .jsonl.gz files, one JSON object a line.
        tokenizer: as :meth:`Tokenizer.load` takes it.
        append_eod: end every document with the tokenizer's end-of-document token.
        skip_bad_lines: bad lines to pass over and list in the manifest; one more is an error.
        shuffle_seed: shuffle the documents with this seed; None keeps their order.

    Raises UserError: missing input, existing output without ``overwrite``, too many bad lines, no document at all.
    """
    prefix = Path(output_prefix)
    existing = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists: pass --overwrite or another --output-prefix")
    reader = JsonlReader(inputs)
    loaded = Tokenizer.load(tokenizer)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(loaded.vocab_size)
    target = prefix
    if shuffle_seed is not None:
        target = prefix.with_name(f"{prefix.name}.unshuffled-{secrets.token_hex(4)}")
    progress = Progress(reader.stored_bytes, show_progress)
    bad_lines: list[str] = []
    num_empty, max_token_id = 0, -1
    with IndexedWriter(target, dtype) as writer, progress:
        for chunk in _tokenized_chunks(reader, (str(tokenizer), json_key, append_eod), num_workers):
            bad_lines += chunk.bad_lines
            if len(bad_lines) > skip_bad_lines:
                raise _bad_lines_error(bad_lines, skip_bad_lines)
            num_empty += chunk.num_empty
            if chunk.tokens.size:
                max_token_id = max(max_token_id, int(chunk.tokens.max()))
                writer.add_documents(chunk.tokens, chunk.lengths)
            progress.update(chunk.read_bytes, chunk.text_bytes)
        if not writer.num_documents:
            raise UserError(f"{', '.join(map(str, inputs))}: no document with any text under {json_key!r}")
        manifest_path(prefix).unlink(missing_ok=True)  # from here on the old manifest would be wrong
        files = writer.publish()
    if shuffle_seed is not None:
        files = _shuffle(target, prefix, shuffle_seed)
    manifest = Manifest(
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        dtype=str(dtype),
        max_token_id=max_token_id,
        append_eod=append_eod,
        tokenizer={
            "name": loaded.path.name,
            "sha256": loaded.content_hash,
            "vocab_size": loaded.vocab_size,
            "eod_id": loaded.eod_id,
        },
        files=files,
        inputs=reader.inputs,
        json_key=json_key,
        shuffle_seed=shuffle_seed,
        num_empty_documents=num_empty,
        bad_lines=bad_lines,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "sentencepiece", "tokenizers")},
        },
    )
    manifest.write(prefix)
    return manifest


def _bad_lines_error(bad_lines: list[str], allowed: int) -> UserError:
    shown = bad_lines[:MAX_BAD_LINES_SHOWN]
    more = f" (and {len(bad_lines) - len(shown)} more so far)" if len(bad_lines) > len(shown) else ""
    shown[-1] += f"{more}; mend the input, or pass over bad lines with --skip-bad-lines N (now {allowed})"
    return UserError(*shown)


def _shuffle(unshuffled: Path, prefix: Path, seed: int) -> dict[str, dict[str, int | str]]:
    """Write the documents of ``unshuffled`` to ``prefix`` in a seeded order, and remove ``unshuffled``."""
    source = IndexedTokens(unshuffled)
    order = Permutation(source.num_documents, "documents", seed)
    with IndexedWriter(prefix, source.dtype) as writer:
        for place in range(source.num_documents):
            document = source.document(order[place])
            writer.add_documents(document, np.array([document.size]))
        files = writer.publish()
    for path in (bin_path(unshuffled), idx_path(unshuffled)):
        path.unlink()
    return files


class Progress:
    """One line on standard error: share done, MB of text, MB/s and the time left. Silent unless ``show``."""

    def __init__(self, total_bytes: int, show: bool) -> None:
        self.total_bytes, self.show = total_bytes, show
        self.text_bytes = 0
        self.start_seconds = time.monotonic()
        self._last_seconds = self.start_seconds

    def update(self, read_bytes: int, text_bytes: int) -> None:
        """``read_bytes`` of all input files are done; ``text_bytes`` of text have come with this chunk."""
        self.text_bytes += text_bytes
        now = time.monotonic()
        if not self.show or now - self._last_seconds < 0.5:
            return
        self._last_seconds = now
        elapsed = now - self.start_seconds
        share = read_bytes / max(1, self.total_bytes)
        left_seconds = elapsed * (1 - share) / share if share else 0
        print(
            f"\r{share:6.1%}  {self.text_bytes / 1e6:,.1f} MB  {self.text_bytes / 1e6 / elapsed:.1f} MB/s  "
            f"{left_seconds:,.0f} s left ",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.show:
            with contextlib.suppress(OSError):
                print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
