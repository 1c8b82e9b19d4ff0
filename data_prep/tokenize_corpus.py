"""Text to tokenised sources: a pair a shard, or all shards in one.

Documents are tokenised one by one (Llama-form BPE slows down on long texts). With at least as many shards as workers
each process does whole shards; with fewer, they share the chunks of one shard after another, and the parent writes
the results in the order of the input. So the files do not depend on the number of workers.

A shard that is done has a manifest that matches its input and the settings: the same command, run again, goes on with
the others.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_prep.inputs import InputFile, find_inputs
from data_prep.merge import merge_sources, refuse_to_overwrite
from data_prep.progress import Progress
from data_prep.records import CHUNK_BYTES, Chunk, TokenizedChunk
from data_prep.tokenize_shard import ChunkTokenizer, Settings, finished, tokenize_shard
from hymba_train.data.manifest import Manifest
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError

_READ, _TEXT, _STOP = range(3)
"""What processes count together: stored bytes and text bytes done, and whether to stop."""


def tokenize_shards(
    files: Sequence[InputFile],
    output_dir: str | Path,
    settings: Settings,
    *,
    num_workers: int = 1,
    overwrite: bool = False,
    show_progress: bool = False,
) -> tuple[list[Manifest], int]:
    """Every shard to a pair of its own, ``output_dir``/<its name without ending>.

    Returns (manifests in the order of ``files``, how many of them were done before).

    Raises UserError: too many bad lines in a shard (the others that are done stay), output of other input or settings
    without ``overwrite``, no document in any shard.
    """
    tokenizer = Tokenizer.load(settings.tokenizer, settings.backend)
    prefixes = {file: Path(output_dir) / file.stem for file in files}
    done: dict[InputFile, Manifest] = {}
    for file, prefix in prefixes.items():
        manifest = finished([file], prefix, settings, tokenizer)
        if manifest:
            done[file] = manifest
        else:
            refuse_to_overwrite(prefix, overwrite)
    num_before = len(done)
    pending = {file: prefix for file, prefix in prefixes.items() if file not in done}
    with Progress(sum(file.num_bytes for file in pending), show_progress) as progress:
        for file, manifest in _run(pending, settings, tokenizer, num_workers, progress):
            done[file] = manifest
    if files and not any(manifest.num_documents for manifest in done.values()):
        raise UserError(f"{files[0].path} and the other inputs: no document with any text under {settings.json_key!r}")
    return [done[file] for file in files], num_before


def tokenize_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    num_workers: int = 1,
    max_bad_lines: int | None = None,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    backend: str = "default",
) -> Manifest:
    """Tokenise all shards into one PREFIX.bin, PREFIX.idx and PREFIX.json.

    The three files appear complete or not at all, the manifest last. Finished shards of an interrupted run stay in
    PREFIX.shards/ until the run is repeated and completed. Output that the same input and settings have made is left
    as it is.

    Args:
        inputs: as :func:`data_prep.inputs.find_inputs` takes them.
        tokenizer, json_key, append_eod, max_bad_lines, backend: see :class:`data_prep.tokenize_shard.Settings`.
        shuffle_seed: shuffle the documents with this seed; None keeps their order.

    Raises UserError: missing input, existing output without ``overwrite``, too many bad lines, no document at all.
    """
    prefix, files = Path(output_prefix), find_inputs(inputs)
    settings = Settings(str(tokenizer), json_key, append_eod, backend, max_bad_lines)
    loaded = Tokenizer.load(tokenizer, backend)
    before = finished(files, prefix, settings, loaded, shuffle_seed)
    if before:
        return before
    refuse_to_overwrite(prefix, overwrite)
    if len(files) == 1 and shuffle_seed is None:
        with Progress(files[0].num_bytes, show_progress) as progress:
            results = _run({files[0]: prefix}, settings, loaded, num_workers, progress, allow_empty=False)
            return next(manifest for _, manifest in results)
    shards = prefix.with_name(f"{prefix.name}.shards")
    for left_over in shards.rglob("*.tmp-*"):  # of a run that was killed
        left_over.unlink()
    try:
        tokenize_shards(files, shards, settings, num_workers=num_workers, overwrite=True, show_progress=show_progress)
    except BaseException:
        _remove_empty_directories(shards)
        raise
    merged = merge_sources([shards / file.stem for file in files], prefix, shuffle_seed=shuffle_seed, overwrite=True)
    shutil.rmtree(shards)
    return merged


def _remove_empty_directories(directory: Path) -> None:
    for path in sorted((p for p in directory.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        directory.rmdir()


def _run(
    pending: dict[InputFile, Path],
    settings: Settings,
    tokenizer: Tokenizer,
    num_workers: int,
    progress: Progress,
    allow_empty: bool = True,
) -> Iterator[tuple[InputFile, Manifest]]:
    """Tokenise shards in the best way for their number; yields each when it is done."""
    stored_bytes = sum(file.num_bytes for file in pending)
    num_workers = min(num_workers, 1 + stored_bytes // CHUNK_BYTES)
    if 1 < num_workers <= len(pending):
        yield from _whole_shards(pending, settings, num_workers, progress)
        return
    with contextlib.ExitStack() as stack:
        if num_workers == 1:
            tokenize_chunks = ChunkTokenizer(settings).map
        else:
            tokenize_chunks = stack.enter_context(_ChunkPool(settings, num_workers)).map
        read_before = text_bytes = 0

        def count(chunk: TokenizedChunk) -> None:
            nonlocal text_bytes
            text_bytes += chunk.text_bytes
            progress.update(read_before + chunk.read_bytes, text_bytes)

        for file, prefix in pending.items():
            yield file, tokenize_shard(file, prefix, settings, tokenizer, tokenize_chunks, count, allow_empty)
            read_before += file.num_bytes


class _ChunkPool:
    """Processes that share the chunks of one shard."""

    def __init__(self, settings: Settings, num_workers: int) -> None:
        self.num_workers = num_workers
        # spawn: forking a process that has run a tokenizers thread pool can hang.
        self._pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (settings, None))

    def map(self, chunks: Iterable[Chunk]) -> Iterator[TokenizedChunk]:
        """Results in the order of the input, with a bounded number of chunks in memory."""
        pending: deque[Future[TokenizedChunk]] = deque()
        with _telling_of_dead_workers():
            for chunk in chunks:
                pending.append(self._pool.submit(_run_chunk, chunk))
                if len(pending) > 3 * self.num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def __enter__(self) -> _ChunkPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _whole_shards(
    pending: dict[InputFile, Path], settings: Settings, num_workers: int, progress: Progress
) -> Iterator[tuple[InputFile, Manifest]]:
    counters = get_context("spawn").Array("q", 3)
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (settings, counters))
    try:
        futures = {pool.submit(_run_shard, file, prefix): file for file, prefix in pending.items()}
        left = set(futures)
        with _telling_of_dead_workers():
            while left:
                finished_now, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
                progress.update(counters[_READ], counters[_TEXT])
                for future in finished_now:
                    yield futures[future], future.result()
    finally:
        counters[_STOP] = 1
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _telling_of_dead_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError("a tokenizing process died (out of memory, or the error above): try fewer --workers") from error
    except UserError as error:
        raise UserError(*str(error).splitlines()) from error  # pickling made one problem of them


_worker: ChunkTokenizer
_counters: Any


class _Stopped(Exception):
    """The parent wants no more."""


def _start_worker(settings: Settings, counters: Any) -> None:
    global _worker, _counters
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle: one message, and time to clean up
        signal.signal(number, signal.SIG_IGN)
    _worker, _counters = ChunkTokenizer(settings), counters


def _run_chunk(chunk: Chunk) -> TokenizedChunk:
    return _worker(chunk)


def _run_shard(file: InputFile, prefix: Path) -> Manifest:
    read_bytes = 0

    def count(chunk: TokenizedChunk) -> None:
        nonlocal read_bytes
        with _counters.get_lock():
            _counters[_READ] += chunk.read_bytes - read_bytes
            _counters[_TEXT] += chunk.text_bytes
        read_bytes = chunk.read_bytes
        if _counters[_STOP]:
            raise _Stopped

    return tokenize_shard(file, prefix, _worker.settings, _worker.tokenizer, _worker.map, count)
