"""Tiny tokenised sources, and the bundled corpus prepared once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_prep.demo import prepare_demo
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.indexed_writer import IndexedWriter


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory that `hymba data prepare-demo` made."""
    directory = tmp_path_factory.getbasetemp() / "demo"  # tests/data and tests/data_prep share it
    prepare_demo(directory)
    return directory


@pytest.fixture
def write_source(tmp_path: Path) -> Callable[..., IndexedTokens]:
    """write_source(name, documents) writes lists of token ids as a .bin/.idx pair without a manifest."""

    def write(name: str, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> IndexedTokens:
        prefix = tmp_path / name
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add_documents(np.array(document, dtype=dtype), np.array([len(document)]))
            writer.publish()
        return IndexedTokens(prefix)

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, which is soon full. Skipped, saying so, where this user may not mount one."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs, so a full disk is not tested: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
