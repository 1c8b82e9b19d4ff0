"""Small models to look at, and a trained one with its export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")


@dataclass
class Trained:
    run: Path
    masked: Path  # trained on documents apart
    export: Path
    text: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    from hymba_train.convert.to_hf import export_hf
    from tests.train.test_training import run, start
    from tests.train.tiny_run import write_data

    directory = tmp_path_factory.mktemp("analysed")
    write_data(directory)
    start(
        directory,
        # Into the second phase, whose held-out sequences have a document's end in them.
        run("plain", "data.document_mask=false", "run.train_steps=5"),
        run("masked", "data.document_mask=true", "run.train_steps=5"),
    )  # fmt: skip
    runs = directory / "runs"
    text = directory / "words.txt"
    text.write_text("w5")  # the tokenizer of the tiny runs splits nothing: one word is one token
    return Trained(runs / "plain", runs / "masked", export_hf(runs / "plain", directory / "export"), text)
