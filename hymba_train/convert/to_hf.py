"""``hymba convert to-hf``: a training checkpoint as a directory that plain transformers loads."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hymba_train.checkpoint import manifest
from hymba_train.convert.hf_config import generation_config
from hymba_train.convert.model_card import model_card
from hymba_train.convert.shards import write_shards
from hymba_train.convert.source import CheckpointWeights, TrainingCheckpoint, parse_dtype
from hymba_train.convert.tokenizer_files import write_chat_template, write_tokenizer_files
from hymba_train.errors import UserError
from hymba_train.files import fsync

DEFAULT_SHARD_BYTES = 5 * 10**9
CODE = ("configuration_hymba.py", "modeling_hymba.py")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export_hf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    license_id: str | None = None,
) -> Path:
    """Write ``output`` from a step directory, or a run's newest complete one. Returns ``output``.

    Reads and writes one tensor at a time on the CPU; needs neither Megatron-Core nor a process group. The directory
    appears complete or not at all, and the weight files' bytes do not depend on the layout that trained the model.

    Args:
        dtype: bfloat16 or float32. None: what the run trains in.
        license_id: licence field of the model card. None: that of the imported weights that it goes
            back to, else "unknown".

    Raises UserError: no complete checkpoint, one whose files are not as its manifest has them, ``output`` exists, an
    unknown dtype.
    """
    source = TrainingCheckpoint.find(checkpoint)
    dtype = dtype or source.dtype
    torch_dtype = parse_dtype(dtype)
    if problems := manifest.verify(source.path):  # nobody would see a flipped bit in an export
        raise UserError(*(f"{problem}; choose another checkpoint" for problem in problems[:10]))
    weights = CheckpointWeights(source)
    with new_directory(output) as directory:
        tokenizer = source.tokenizer_path()
        token_ids = source.token_ids(write_tokenizer_files(tokenizer, directory) if tokenizer is not None else None)
        if tokenizer is not None and source.config.run.objective != "pretrain":
            write_chat_template(directory)
        files = write_shards(directory, weights.plan(torch_dtype), weights.read, max_shard_bytes)
        _write_json(directory / "config.json", source.hf_config(dtype, token_ids))
        _write_json(directory / "generation_config.json", generation_config(token_ids))
        for name in CODE:
            shutil.copyfile(Path(__file__).parent.parent / "hf" / name, directory / name)
        card = model_card(source, dtype, has_tokenizer=tokenizer is not None, license_id=license_id, files=files)
        (directory / "README.md").write_text(card, encoding="utf-8")
    return output


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to write into beside ``output``. It takes that name when all is written, and vanishes otherwise.

    Raises UserError: ``output`` exists, or cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already; choose another --output or remove it")
    temporary = output.with_name(f".{output.name}.incomplete-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror})") from error
    try:
        yield temporary
        for path in temporary.rglob("*"):
            fsync(path)
        fsync(temporary)
        os.rename(temporary, output)
        fsync(output.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{output}: cannot be written ({error})") from error
        raise


def parse_bytes(text: str) -> int:
    """Size such as ``2GB``, ``500MB`` or ``100000``. Raises UserError.

    >>> parse_bytes("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{text!r} is no size; give one such as 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
