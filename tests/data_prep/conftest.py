"""The bundled corpus, and the demo prepared from it once."""

from __future__ import annotations

import json
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
