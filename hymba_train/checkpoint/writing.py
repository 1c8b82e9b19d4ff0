"""Writing and publishing a checkpoint without talking to other ranks: what the background processes do.

Every rank's process writes its files, reads them back, and leaves a report in the step directory. Rank 0's then waits
for all reports, writes index, metadata and manifest, and publishes.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.metadata import MetadataIndex

from hymba_train.checkpoint import directory, manifest
from hymba_train.checkpoint.metadata import write_metadata
from hymba_train.checkpoint.share import BACKEND, BACKEND_VERSION, Share
from hymba_train.files import write_atomically

REPORT = "written_{rank:05d}.json"
SECONDS_BETWEEN_LOOKS = 0.05
_BUFFER_BYTES = 1 << 20  # small tensors are gathered to writes of this size


def write_share(share: Share, path: Path, rank: int) -> None:
    """Bring this rank's files into the step directory ``path`` and to the disk, read them back, and report.

    Raises OSError naming the file.
    """
    report = {}
    for name, entries in share.files.items():
        with _named(path / name):
            expected, tensors = _write_file(path / name, entries)
            found = manifest.hash_file(path / name)
        if found != expected:
            raise OSError(f"{path / name}: reads back differently from what was written")
        report[name] = {"num_bytes": found.num_bytes, "xxh3_128": found.xxh3_128, "tensors": tensors}
    with _named(path / REPORT.format(rank=rank)):
        write_atomically(path / REPORT.format(rank=rank), json.dumps(report))


def publish(share: Share, path: Path, metadata: dict[str, Any], num_ranks: int) -> Path:
    """On rank 0: wait for all ranks' reports, complete the step directory and publish it. Returns the published path.

    A rank that never reports is noticed by its own training process, which has this one ended.
    """
    reports = _wait_for_reports(path, num_ranks)
    entries, tensors, results = {}, {}, []
    for report in reports:
        for name, file in report.items():
            entries[name] = manifest.Entry(file["num_bytes"], file["xxh3_128"])
            tensors[name] = [(t["name"], t["offset"], t["num_bytes"], t["xxh3_128"]) for t in file["tensors"]]
            results += [Share.result(_index(t), name, t["offset"], t["num_bytes"]) for t in file["tensors"]]
    with _named(path):
        for rank in range(num_ranks):
            (path / REPORT.format(rank=rank)).unlink()
        share.finish(results)
        save_config(CheckpointingConfig(BACKEND, BACKEND_VERSION), str(path))
        write_metadata(path, metadata)
        manifest.write_tensors(path, tensors)
        for name in manifest.file_names(path):
            if name not in entries:
                entries[name] = manifest.hash_file(path / name)
        manifest.write(path, entries)
        return directory.publish(path)


def _write_file(path: Path, entries: list[tuple[MetadataIndex, Any]]) -> tuple[manifest.Entry, list[dict]]:
    """(what the file must be, where each entry lies and its checksum), reckoned from memory."""
    whole, tensors, offset = xxhash.xxh3_128(), [], 0
    with open(path, "xb", buffering=_BUFFER_BYTES) as file:
        for index, data in entries:
            content = _serialized(data)
            file.write(content)
            whole.update(content)
            tensors.append(
                {
                    "name": index.fqn,
                    "part": None if index.offset is None else list(index.offset),
                    "index": index.index,
                    "offset": offset,
                    "num_bytes": len(content),
                    "xxh3_128": xxhash.xxh3_128_hexdigest(content),
                }
            )
            offset += len(content)
        file.flush()
        os.fsync(file.fileno())
    return manifest.Entry(offset, whole.hexdigest()), tensors


def _serialized(data: io.BytesIO | torch.Tensor) -> memoryview:
    if isinstance(data, torch.Tensor):
        buffer = io.BytesIO()
        # A view would bring its whole storage along.
        torch.save(data if data.untyped_storage().nbytes() == data.nbytes else data.clone(), buffer)
        data = buffer
    return data.getbuffer()


def _index(entry: dict) -> MetadataIndex:
    part = entry["part"]
    return MetadataIndex(entry["name"], None if part is None else torch.Size(part), entry["index"])


def _wait_for_reports(path: Path, num_ranks: int) -> list[dict]:
    wanted = [REPORT.format(rank=rank) for rank in range(num_ranks)]
    # Listed, not asked for by name: NFS remembers for up to a minute that a file is not there.
    while not set(wanted) <= set(os.listdir(path)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return [json.loads((path / name).read_text(encoding="utf-8")) for name in wanted]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reads and writes do not say of which file; add it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
