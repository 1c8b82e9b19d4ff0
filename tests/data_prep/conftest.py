"""The bundled corpus, and the demo prepared from it once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.demo import CORPUS, DOMAINS, prepare_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory that `hymba data prepare-demo` made."""
    directory = tmp_path_factory.getbasetemp() / "demo"  # tests/data and tests/data_prep share it
    prepare_demo(directory)
    return directory


@pytest.fixture(scope="session")
def corpus() -> dict[str, list[str]]:
    """Domain -> texts of the bundled corpus."""
    return {
        domain: [json.loads(line)["text"] for line in (CORPUS / f"{domain}.jsonl").read_text("utf-8").splitlines()]
        for domain in DOMAINS
    }


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
