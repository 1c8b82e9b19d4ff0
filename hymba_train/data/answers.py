"""Files that lie beside a tokenised source of conversations: which tokens carry loss, and reference log-probabilities.

PREFIX.mask: a byte a token of PREFIX.bin, 1 where the token is (part of) an answer and is to be predicted, else 0.
PREFIX.reference: the log-probability of each document's answers under the model that DPO starts from; float32
[documents], a JSON trailer with the facts, its length (u64), magic. ``hymba reference`` writes it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hymba_train.data.manifest import check_spots, spot_hashes
from hymba_train.data.packs import Packs
from hymba_train.data.user_files import write_or_refuse
from hymba_train.data.windows import Sequences
from hymba_train.errors import UserError
from hymba_train.files import fsync, sync_and_close, temporary_path

MAGIC = b"HYREFLP\x01"
_TAIL = struct.Struct("<Q8s")


def mask_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.mask")


def reference_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.reference")


class LossMask:
    """Read access to PREFIX.mask by token offsets, as :class:`hymba_train.data.indexed.IndexedTokens` gives it.

    Args:
        facts: the manifest's entry: bytes, sha256, spots.

    Raises UserError: missing, or not the file that the manifest describes.
    """

    def __init__(self, prefix: str | Path, facts: Mapping[str, Any]) -> None:
        path = mask_path(prefix)
        if not path.is_file():
            raise UserError(f"{path} does not exist, but {prefix}.json names it: run `hymba data chat` again")
        check_spots(path, facts)
        self.sha256 = facts["sha256"]
        self._bytes = np.memmap(path, np.uint8, "r") if facts["bytes"] else np.empty(0, np.uint8)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """1 for tokens that carry loss, else 0, int64 [end - begin]."""
        return self._bytes[begin:end].astype(np.int64)


def over(sequences: Sequences, mask: LossMask) -> Sequences:
    """The same sequences, read from the mask instead of the tokens; padding is 0."""
    twin = copy.copy(sequences)
    # Reading asks for tokens() alone, which a mask has as well.
    twin.part = replace(sequences.part, tokens=mask)  # type: ignore[arg-type]
    if isinstance(twin, Packs):
        twin.pad_id = 0
    return twin


class MaskWriter:
    """Writes PREFIX.mask: whole, or not at all. A context manager, as IndexedWriter."""

    def __init__(self, prefix: str | Path) -> None:
        self._path = mask_path(prefix)
        self._temporary = temporary_path(self._path)
        self._stream = open(self._temporary, "wb")  # noqa: SIM115  closed in publish() or on exit
        self._hash = hashlib.sha256()
        self.num_answer_tokens = 0

    def add(self, mask: np.ndarray) -> None:
        """Append the bytes of some documents, end to end."""
        data = np.ascontiguousarray(mask, dtype=np.uint8).data
        self._stream.write(data)
        self._hash.update(data)
        self.num_answer_tokens += int(mask.sum())

    def publish(self) -> dict[str, Any]:
        """fsync and rename. Returns the manifest's entry."""
        sync_and_close(self._stream)
        os.replace(self._temporary, self._path)
        fsync(self._path.parent)
        size = self._path.stat().st_size
        return {"bytes": size, "sha256": self._hash.hexdigest(), "spots": spot_hashes(self._path)}

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._temporary.unlink(missing_ok=True)


class Reference:
    """Log-probabilities of a source's documents under the start model.

    Attributes:
        facts: ``source`` (content hash of the tokenised source), ``checkpoint`` (hash of the start model's manifest),
            ``sha256`` of the values, and what else was noted.

    Raises UserError: no such file, or a damaged one.
    """

    def __init__(self, prefix: str | Path) -> None:
        path = reference_path(prefix)
        again = "run `hymba reference` with the overrides of this run"
        try:
            content = path.read_bytes()
            length, magic = _TAIL.unpack(content[-_TAIL.size :])
            values, trailer = content[: -_TAIL.size - length], content[-_TAIL.size - length : -_TAIL.size]
            self.facts: dict[str, Any] = json.loads(trailer) if magic == MAGIC else {}
            sound = self.facts.get("sha256") == hashlib.sha256(values).hexdigest()
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: {again}") from error
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"{path} is not a whole reference file: {again}") from error
        if not sound:
            raise UserError(f"{path} is not a whole reference file: {again}")
        self.values = np.frombuffer(values, np.float32)


def write_reference(prefix: str | Path, values: np.ndarray, facts: Mapping[str, Any]) -> Path:
    """Write PREFIX.reference, complete or not at all. ``values`` float32 [documents]."""
    data = np.ascontiguousarray(values, dtype=np.float32).tobytes()
    trailer = json.dumps({**facts, "sha256": hashlib.sha256(data).hexdigest()}, sort_keys=True).encode()
    path = reference_path(prefix)
    write_or_refuse(path, data + trailer + _TAIL.pack(len(trailer), MAGIC))
    return path
