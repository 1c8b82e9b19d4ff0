"""A shard again, in its own format, without some of its records."""

from __future__ import annotations

import gzip
from collections.abc import Container
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.inputs import PARQUET, InputFile
from data_prep.records import ShardReader
from hymba_train.data.extras import import_extra
from hymba_train.data.user_files import replacing_or_refused


def rewrite_shard(file: InputFile, target: Path, removed: Container[int], json_key: str) -> None:
    """Write a shard without the records of these numbers, whole or not at all. Lines that stay are copied byte by
    byte. Raises UserError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_or_refused(target) as temporary:
        if file.format == PARQUET:
            _rewrite_rows(file, temporary, removed)
        else:
            _rewrite_lines(file, temporary, removed, json_key)


def _rewrite_lines(file: InputFile, temporary: Path, removed: Container[int], json_key: str) -> None:
    with open(temporary, "wb") as raw, _compressed(file, raw) as stream:
        for chunk in ShardReader(file, json_key):
            kept = [line for number, line in enumerate(chunk.records, chunk.first) if number not in removed]
            stream.write(b"".join(kept))


def _compressed(file: InputFile, raw: BinaryIO) -> Any:
    if file.compression == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="")
    if file.compression == "zstd":
        zstandard = import_extra("zstandard", f"writing {file.path}")
        return zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
    return raw


def _rewrite_rows(file: InputFile, temporary: Path, removed: Container[int]) -> None:
    pyarrow = import_extra("pyarrow", f"writing {file.path}")
    parquet = import_extra("pyarrow.parquet", f"writing {file.path}")
    with parquet.ParquetFile(file.path) as table, parquet.ParquetWriter(temporary, table.schema_arrow) as writer:
        row = 0
        for batch in table.iter_batches(use_threads=False):
            kept = [number not in removed for number in range(row, row + batch.num_rows)]
            writer.write_batch(batch.filter(pyarrow.array(kept, pyarrow.bool_())))
            row += batch.num_rows
