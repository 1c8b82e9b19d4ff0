"""Removing duplicate documents from text shards, which keep their names, formats and order.

Pass 1 hashes every document, :mod:`data_prep.duplicates` decides, pass 2 writes the shards again. Of every cluster the
first document of the input stays. Lines that stay are copied byte by byte, bad ones too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.bad_lines import check_bad_lines
from data_prep.duplicates import DedupSettings, ShardHashes, find_duplicates, signatures_of
from data_prep.inputs import InputFile
from data_prep.records import ShardReader, parse_chunk
from data_prep.rewrite import rewrite_shard
from hymba_train.data.extras import import_extra
from hymba_train.data.manifest import file_sha256
from hymba_train.data.user_files import write_or_refuse
from hymba_train.errors import UserError

REPORT, REMOVED = "dedup.json", "removed.jsonl"


def dedup(
    files: Sequence[InputFile],
    output_dir: str | Path,
    settings: DedupSettings,
    *,
    num_workers: int = 1,
    max_bad_lines: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the shards without their duplicates to ``output_dir``, with REMOVED and REPORT. Returns the report.

    Needs 16 bytes of memory a document, and 4 * num_hashes on disk for minhash.

    Raises UserError: bad lines, bad settings, other output there.
    """
    _check(settings)
    output = Path(output_dir)
    report_path = output / REPORT
    inputs = [{"name": file.name, "bytes": file.num_bytes, "sha256": file_sha256(file.path)} for file in files]
    facts = {"settings": asdict(settings), "inputs": inputs}
    if report_path.is_file():
        report = json.loads(report_path.read_bytes())
        if {key: report.get(key) for key in facts} == facts:
            return report
        if not overwrite:
            raise UserError(f"{report_path} is of other input or settings: pass --overwrite or another --output-dir")
        report_path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dedup-", dir=output) as scratch:
        jobs = [(file, settings, max_bad_lines, f"{scratch}/{i}") for i, file in enumerate(files)]
        bad_lines = []
        for number, bad in enumerate(_map(_hash_shard, jobs, num_workers), 1):
            bad_lines += bad
            say(f"hashed {number} of {len(files)} shards")
        hashes = [_load(job[3], settings) for job in jobs]
        same_as, similarity = find_duplicates(hashes, settings)
        say(f"{int((same_as >= 0).sum()):,} of {same_as.size:,} documents are duplicates")
        borders = np.cumsum([0, *(h.records.size for h in hashes)])
        jobs = [
            (file, output / file.name, h.records[same_as[begin:end] >= 0], settings.json_key)
            for file, h, begin, end in zip(files, hashes, borders[:-1], borders[1:], strict=True)
        ]
        for number, _ in enumerate(_map(_rewrite, jobs, num_workers), 1):
            say(f"wrote {number} of {len(files)} shards")
        _write_removed(output / REMOVED, files, hashes, borders, same_as, similarity)
    report = facts | {
        "num_documents": int(same_as.size),
        "num_removed": int((same_as >= 0).sum()),
        "bad_lines": bad_lines,
    }
    write_or_refuse(report_path, json.dumps(report, indent=1).encode() + b"\n")
    return report


def _check(settings: DedupSettings) -> None:
    if settings.method == "minhash":
        import_extra("rensa", "MinHash")
        if settings.num_bands < 1 or settings.num_hashes % settings.num_bands:
            raise UserError(f"--num-hashes {settings.num_hashes} is not a multiple of --num-bands {settings.num_bands}")
        if not 0 < settings.threshold <= 1:
            raise UserError(f"--threshold {settings.threshold}: give a share above 0, at most 1")


def _map(function: Callable[..., Any], jobs: Sequence[tuple], num_workers: int) -> Iterator[Any]:
    """Results in order, from several processes where that helps."""
    if min(num_workers, len(jobs)) <= 1:
        yield from (function(*job) for job in jobs)
        return
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a process a core already
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), get_context("spawn"))
    try:
        futures = [pool.submit(function, *job) for job in jobs]
        for future in futures:
            yield future.result()
    except UserError as error:
        raise UserError(*str(error).splitlines()) from error  # pickling made one problem of them
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_shard(file: InputFile, settings: DedupSettings, max_bad_lines: int | None, target: str) -> list[str]:
    """Pass 1 of a shard, into TARGET.*.npy. Returns its bad lines."""
    records, exact, signatures, bad_lines = [], [], [], []
    for chunk in ShardReader(file, settings.json_key):
        parsed = parse_chunk(chunk, settings.json_key)
        bad_lines += parsed.bad_lines
        check_bad_lines(bad_lines, max_bad_lines)
        records += parsed.numbers
        exact += [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in parsed.texts]
        if settings.method == "minhash" and parsed.texts:
            signatures.append(signatures_of(parsed.texts, settings))
    arrays = {
        "records": np.array(records, dtype=np.int64),
        "exact": np.frombuffer(b"".join(exact), dtype=np.uint64).reshape(-1, 2),
    }
    if settings.method == "minhash":
        arrays["signatures"] = np.concatenate([np.empty((0, settings.num_hashes), np.uint32), *signatures])
    for name, array in arrays.items():
        path = f"{target}.{name}.npy"
        try:
            np.save(path, array)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path}: cannot be written ({reason}) while hashing {file.path}: make room") from error
    return bad_lines


def _load(target: str, settings: DedupSettings) -> ShardHashes:
    records, exact = (np.load(f"{target}.{name}.npy") for name in ("records", "exact"))
    signatures = np.load(f"{target}.signatures.npy", mmap_mode="r") if settings.method == "minhash" else None
    return ShardHashes(records, exact, signatures)


def _rewrite(file: InputFile, target: Path, removed: np.ndarray, json_key: str) -> None:
    rewrite_shard(file, target, set(removed.tolist()), json_key)


def _write_removed(
    path: Path, files: Sequence[InputFile], hashes: Sequence[ShardHashes], borders: np.ndarray, same_as: np.ndarray,
    similarity: np.ndarray,
) -> None:  # fmt: skip
    """A line a removed document: where it was, which one stays, how alike they are."""

    def place(document: int) -> str:
        shard = int(np.searchsorted(borders, document, side="right")) - 1
        return f"{files[shard].name}:{hashes[shard].records[document - borders[shard]]}"

    lines = []
    for i in np.flatnonzero(same_as >= 0).tolist():
        facts = {"document": place(i), "duplicate_of": place(int(same_as[i])), "similarity": float(similarity[i])}
        lines.append(json.dumps(facts) + "\n")
    write_or_refuse(path, "".join(lines).encode())
