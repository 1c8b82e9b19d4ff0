"""A faster library for the same ids: proven on all text there is, checked on load and while it runs, never silent."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.demo import CORPUS, DOMAINS
from data_prep.tokenize_corpus import tokenize_files
from hymba_train.data import tokenizer_backends
from hymba_train.data.manifest import read_manifest
from hymba_train.data.tokenizer import SAMPLE_TEXTS, Tokenizer
from hymba_train.errors import UserError

SHARED = Path(os.environ.get("HYMBA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data" / "corpus"
FORMS = ("tokenizer.json", "tokenizer.model")


def shared_texts() -> list[tuple[str, str]]:
    """(place, text) of every document of the shared corpus, or of the bundled one where that is not there."""
    directory = SHARED if SHARED.is_dir() else CORPUS
    return [
        (f"{path.name}:{number}", json.loads(line)["text"])
        for path in sorted(directory.glob("*.jsonl"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
    ]


@pytest.fixture(scope="module")
def all_texts() -> list[tuple[str, str]]:
    texts = shared_texts()
    assert len(texts) >= 245
    return texts


@pytest.fixture(scope="module")
def expected(demo, all_texts) -> list[list[int]]:
    """SentencePiece's ids of every shared document."""
    return Tokenizer.load(demo / "tokenizer/tokenizer.model").encode_batch([text for _, text in all_texts])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["default", "gigatoken"])
def test_ids_equal_sentencepiece_on_every_shared_document(demo, all_texts, expected, form, backend):
    tokenizer = Tokenizer.load(demo / "tokenizer" / form, backend)
    flat, lengths = tokenizer.encode_documents([text for _, text in all_texts], np.dtype(np.int32), append_eod=False)
    assert lengths.size == len(all_texts)
    for (place, _), ids, wanted in zip(all_texts, np.split(flat, np.cumsum(lengths)[:-1]), expected, strict=True):
        assert ids.tolist() == wanted, place


@pytest.mark.parametrize("form", FORMS)
def test_text_to_ids_to_text_on_every_shared_document(demo, all_texts, expected, form):
    tokenizer = Tokenizer.load(demo / "tokenizer" / form)
    for (place, text), ids in zip(all_texts, expected, strict=True):
        assert tokenizer.decode(ids) == text, place


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["default", "gigatoken"])
def test_documents_for_a_file(demo, form, backend):
    tokenizer = Tokenizer.load(demo / "tokenizer" / form, backend)
    texts = ["first", "", "</s> is no end", *SAMPLE_TEXTS]
    for append_eod in (True, False):
        flat, lengths = tokenizer.encode_documents(texts, np.dtype(np.uint16), append_eod)
        assert (flat.dtype, lengths.dtype) == (np.uint16, np.int32)
        found = [ids.tolist() for ids in np.split(flat, np.cumsum(lengths)[:-1])]
        assert found == [tokenizer.encode(text, add_eod=append_eod) for text in texts if text]
    flat, lengths = tokenizer.encode_documents(["", ""], np.dtype(np.uint16), True)
    assert (flat.size, lengths.size) == (0, 0)


def test_files_do_not_depend_on_the_backend(demo, tmp_path):
    inputs = [CORPUS / f"{domain}.jsonl" for domain in DOMAINS]
    for backend in ("default", "gigatoken"):
        tokenize_files(inputs, tmp_path / backend, demo / "tokenizer", backend=backend)
    for suffix in ("bin", "idx"):
        one, two = (tmp_path / f"{backend}.{suffix}" for backend in ("default", "gigatoken"))
        assert one.read_bytes() == two.read_bytes()
    assert [read_manifest(tmp_path / name).backend for name in ("default", "gigatoken")] == ["tokenizers", "gigatoken"]
    assert "gigatoken" in read_manifest(tmp_path / "gigatoken").versions


@pytest.fixture
def wrong(monkeypatch):
    """gigatoken that gets the letter q wrong."""
    right = tokenizer_backends.GigaToken.encode_flat

    def encode_flat(self, texts):
        return right(self, [text.replace("q", "k") for text in texts])

    monkeypatch.setattr(tokenizer_backends.GigaToken, "encode_flat", encode_flat)


def test_a_backend_that_differs_is_refused_when_it_is_loaded(demo, wrong):
    with pytest.raises(UserError, match=r"gigatoken and tokenizers differ from token \d+ of the text .*: use the back"):
        Tokenizer.load(demo / "tokenizer", "gigatoken")


def test_a_backend_that_differs_on_the_users_text_is_refused_while_it_runs(demo, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hymba_train.data.tokenizer.SAMPLE_TEXTS", ("no such letter",))
    (tmp_path / "in.jsonl").write_text('{"text": "quite"}\n')
    command = ["tokenize", "--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(demo / "tokenizer"),
               "--output-prefix", str(tmp_path / "out"), "--backend", "gigatoken", "--workers", "1"]  # fmt: skip
    assert main(command) == 2
    assert "gigatoken and tokenizers differ from token" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_tokenizer_that_it_cannot_read_is_named(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel

    Fast(WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="gigatoken cannot read this tokenizer") as caught:
        Tokenizer.load(tmp_path, "gigatoken")
    assert "\n" not in str(caught.value)


def test_without_gigatoken_the_extra_is_named(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError, match=r"gigatoken needs the package gigatoken: pip install 'hymba-train\[data\]'"):
        Tokenizer.load(demo / "tokenizer", "gigatoken")


def test_unknown_backend(demo):
    with pytest.raises(UserError, match="no tokenizer backend tiktoken: there are default, gigatoken"):
        Tokenizer.load(demo / "tokenizer", "tiktoken")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back to the system so soon")
def test_memory_stays_with_the_process_between_chunks(demo):
    """The pages of 24 MB that are freed are there, untouched by the system, when 24 MB are taken again."""
    program = (
        "import resource, sys\n"
        "from data_prep.tokenize_shard import ChunkTokenizer, Settings\n"
        "worker = ChunkTokenizer(Settings(sys.argv[1]))\n"
        "def new_pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    texts = [bytes(50_000) for _ in range(500)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(new_pages(), new_pages())\n"
    )
    made = subprocess.run(
        [sys.executable, "-c", program, str(demo / "tokenizer")], capture_output=True, text=True, check=True
    )
    first, second = map(int, made.stdout.split())
    assert second < first / 10, (first, second)
