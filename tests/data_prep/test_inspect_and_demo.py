"""Looking into a source, proving it whole, and the demo data set."""

import json
import shutil

import pytest

from data_prep.cli import main
from data_prep.demo import CORPUS, DOMAINS, prepare_demo


@pytest.fixture
def copied(demo, tmp_path):
    """A copy of the demo data that a test may damage."""
    directory = tmp_path / "copied"
    shutil.copytree(demo, directory)
    return directory


def contents(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_demo_is_the_same_every_time(demo, tmp_path):
    assert prepare_demo(tmp_path / "again") is True
    assert contents(tmp_path / "again") == contents(demo)
    expected = {f"{domain}.{suffix}" for domain in DOMAINS for suffix in ("bin", "idx", "json")}
    assert set(contents(demo)) == expected | {"demo.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer.model"}


def test_complete_demo_is_left_alone(copied, capsys):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert main(["prepare-demo", "--output", str(copied)]) == 0
    assert "are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("books.bin", "changed"),
        *(
            pytest.param(name, damage, marks=pytest.mark.slow)
            for name in ("books.bin", "docs.json", "tokenizer/tokenizer.json", "demo.json")
            for damage in ("missing", "changed")
            if (name, damage) != ("books.bin", "changed")
        ),
    ],
)
def test_damaged_demo_is_made_again(copied, demo, name, damage):
    if damage == "missing":
        (copied / name).unlink()
    else:
        (copied / name).write_bytes((copied / name).read_bytes()[:-3] + b"???")
    assert prepare_demo(copied) is True
    assert contents(copied) == contents(demo)


def test_corpus_comes_with_its_licence_notes():
    readme = (CORPUS / "README.md").read_text()
    for domain in DOMAINS:
        num_documents = len((CORPUS / f"{domain}.jsonl").read_text("utf-8").splitlines())
        assert f"| {domain}.jsonl | {num_documents} |" in readme
    assert "Redistribution and use in source and binary forms" in (CORPUS / "LICENSE.sympy").read_text()


def test_facts(demo, capsys):
    assert main(["inspect", str(demo / "books")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{demo}/books: 154,535 tokens (uint16) in 48 documents, 3,219.5 tokens a document"
    assert lines[1].startswith("tokenizer tokenizer.json: 4,096 tokens, sha256 ")


def test_document_and_window_as_text(demo, corpus, capsys):
    tokenizer = ["--tokenizer", str(demo / "tokenizer")]
    assert main(["inspect", str(demo / "books"), "--document", "47", *tokenizer]) == 0
    assert capsys.readouterr().out == corpus["books"][47] + "</s>\n"
    assert main(["inspect", str(demo / "books"), "--window", "0", "--seq-length", "32", *tokenizer]) == 0
    assert corpus["books"][0].startswith(capsys.readouterr().out.rstrip("\n"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--document", "48"], "--document 48: {prefix} has documents 0..47"),
        (["--window", "-1"], "--window -1: {prefix} has windows 0..74 of 2048 tokens"),
    ],
)
def test_numbers_outside_are_refused(demo, capsys, flags, message):
    assert main(["inspect", str(demo / "books"), "--tokenizer", str(demo / "tokenizer"), *flags]) == 2
    assert capsys.readouterr().err == f"error: {message.format(prefix=demo / 'books')}\n"


def test_text_needs_a_tokenizer(demo, capsys):
    assert main(["inspect", str(demo / "books"), "--document", "0"]) == 2
    assert capsys.readouterr().err == "error: --tokenizer is needed to show text\n"


def test_validate_reads_every_byte(copied, capsys):
    assert main(["validate", *(str(copied / domain) for domain in DOMAINS)]) == 0
    assert capsys.readouterr().out.count("agree with the manifest") == 4
    content = bytearray((copied / "docs.bin").read_bytes())
    content[1000] ^= 1
    (copied / "docs.bin").write_bytes(content)
    assert main(["validate", *(str(copied / domain) for domain in DOMAINS)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {copied}/docs.bin has sha256 ")


def test_renamed_source_is_still_valid(copied, capsys):
    for suffix in ("bin", "idx", "json"):
        (copied / f"code.{suffix}").rename(copied / f"renamed.{suffix}")
    assert main(["validate", str(copied / "renamed")]) == 0


def test_source_without_manifest(copied, capsys):
    (copied / "code.json").unlink()
    assert main(["validate", str(copied / "code")]) == 0
    assert "there is no manifest" in capsys.readouterr().out
    assert main(["inspect", str(copied / "code")]) == 0
    assert "no manifest" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["unknown"], [], ["tokenize", "--inptu", "x"], ["tokenize", "--part", "3/3"]])
def test_wrong_flags_are_one_line(argv, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_no_permission_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["prepare-demo", "--output", str(tmp_path / "file" / "below")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_demo_manifest_lists_every_file(demo):
    listed = set(json.loads((demo / "demo.json").read_bytes())["files"])
    assert listed == set(contents(demo)) - {"demo.json"}
