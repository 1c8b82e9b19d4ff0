"""Shards in, shards out: formats, directories, many workers, resuming, faults, merging."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import inputs, tokenize_corpus
from data_prep.cli import main
from data_prep.demo import CORPUS, DOMAINS
from data_prep.inputs import find_inputs
from data_prep.tokenize_corpus import tokenize_files
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.manifest import read_manifest
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError

TEXTS = [f"Document {i}: é中\U0001f600 {'word ' * (i % 7)}" for i in range(40)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def write_parquet(path: Path, texts, column: str = "text", **more) -> None:
    pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], column: texts}), path, **more)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "frames.jsonl.zst": lambda path: path.write_bytes(b"".join(map(zstandard.compress, (LINES[:999], LINES[999:])))),
    "a.parquet": lambda path: write_parquet(path, TEXTS, row_group_size=7),
    "large_string.parquet": lambda path: write_parquet(path, pa.array(TEXTS, pa.large_string())),
    "dictionary.parquet": lambda path: write_parquet(path, pa.array(TEXTS).dictionary_encode()),
}  # fmt: skip


@pytest.fixture
def run(demo, capsys):
    """run(*arguments) -> (exit code, output, errors) of `hymba data tokenize` with the demo's tokenizer."""

    def run_cli(*arguments) -> tuple[int, str, str]:
        flags = [] if "--workers" in arguments else ["--workers", "1"]
        code = main(["tokenize", "--tokenizer", str(demo / "tokenizer"), *flags, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run_cli


def documents_of(prefix) -> list[list[int]]:
    tokens = IndexedTokens(prefix)
    return [tokens.document(d).tolist() for d in range(tokens.num_documents)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(run, tmp_path, demo, name):
    WRITERS[name](tmp_path / name)
    assert run("--input", tmp_path / name, "--output-prefix", tmp_path / "out")[0] == 0
    tokenizer = Tokenizer.load(demo / "tokenizer")
    assert documents_of(tmp_path / "out") == [[*tokenizer.encode(text), 2] for text in TEXTS]
    (facts,) = read_manifest(tmp_path / "out").inputs
    assert (facts["records"], facts["text_bytes"]) == (len(TEXTS), sum(len(text.encode()) for text in TEXTS))


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith(("jsonl", ".json"))])
def test_a_file_cut_short_is_named_and_leaves_nothing(run, tmp_path, name):
    WRITERS[name](tmp_path / name)
    os.truncate(tmp_path / name, os.path.getsize(tmp_path / name) - 9)
    code, _, err = run("--input", tmp_path / name, "--output-prefix", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/{name}: cannot be read after ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_rows_of_parquet_are_named(run, tmp_path):
    values = pa.array(["good", None, "good"])
    write_parquet(tmp_path / "a.parquet", values)
    code, _, err = run("--input", tmp_path / "a.parquet", "--output-prefix", tmp_path / "out", "--max-bad-lines", "0")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/a.parquet:row 1: the value of 'text' is not a string but NoneType")
    bad = pa.array([b"good", b"\xff\xfe", b"good"]).view(pa.string())
    write_parquet(tmp_path / "b.parquet", bad)
    code, _, err = run("--input", tmp_path / "b.parquet", "--output-prefix", tmp_path / "out", "--max-bad-lines", "0")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/b.parquet:row 1: invalid UTF-8 at byte 0 of the value of 'text'")


def test_missing_column_is_told_with_those_there_are(run, tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, column="content")
    code, _, err = run("--input", tmp_path / "a.parquet", "--output-prefix", tmp_path / "out")
    assert (code, err) == (
        2, f"error: {tmp_path}/a.parquet has no column 'text'; it has id, content: set --json-keys\n",
    )  # fmt: skip
    assert run("--input", tmp_path / "a.parquet", "--json-keys", "content", "--output-prefix", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_extra(run, tmp_path, monkeypatch, name, package):
    WRITERS[name](tmp_path / name)
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("--input", tmp_path / name, "--output-prefix", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"error: reading {tmp_path}/{name} needs the package {package}")
    assert err.endswith("pip install 'hymba-train[data]'\n")


@pytest.fixture
def shards(tmp_path) -> Path:
    """A directory of five shards of all formats, in two levels."""
    directory = tmp_path / "in"
    (directory / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "sub/d.parquet", "sub/e.jsonl"]):
        texts = TEXTS[number * 8 : number * 8 + 8]
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        path = directory / name
        if name.endswith("parquet"):
            write_parquet(path, texts)
        else:
            compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
            path.write_bytes(compress(lines))
    (directory / "README.md").write_text("not an input")
    return directory


STEMS = ["a", "b", "c", "sub/d", "sub/e"]


def test_a_directory_gives_a_pair_a_shard(run, shards, tmp_path, demo):
    code, out, err = run("--input", shards, "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "40 documents in 5 shards, 0 of them done before" in out
    tokenizer = Tokenizer.load(demo / "tokenizer")
    found = [document for stem in STEMS for document in documents_of(tmp_path / "out" / stem)]
    assert found == [[*tokenizer.encode(text), 2] for text in TEXTS]
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert made == {f"{stem}.{suffix}" for stem in STEMS for suffix in ("bin", "idx", "json")}


@pytest.mark.parametrize("workers", [1, 2])
def test_all_shards_in_one_is_the_same_however_many_workers(run, shards, tmp_path, demo, monkeypatch, workers):
    monkeypatch.setattr(tokenize_corpus, "CHUNK_BYTES", 1)  # small as the shards are, they are worth a process
    assert run("--input", shards, "--output-prefix", tmp_path / "one", "--workers", str(workers))[0] == 0
    tokenizer = Tokenizer.load(demo / "tokenizer")
    assert documents_of(tmp_path / "one") == [[*tokenizer.encode(text), 2] for text in TEXTS]
    manifest = read_manifest(tmp_path / "one")
    assert [facts["name"] for facts in manifest.inputs] == [
        "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "sub/d.parquet", "sub/e.jsonl",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "one.bin", "one.idx", "one.json"]


def test_finished_shards_are_passed_over_and_changed_ones_refused(run, shards, tmp_path):
    run("--input", shards, "--output-dir", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    for stem in ("b", "sub/e"):
        (tmp_path / "out" / f"{stem}.json").unlink()  # killed before the manifest was written
        (tmp_path / "out" / f"{stem}.bin").unlink()
        (tmp_path / "out" / f"{stem}.idx").unlink()
    code, out, _ = run("--input", shards, "--output-dir", tmp_path / "out")
    assert code == 0
    assert "5 shards, 3 of them done before" in out
    again = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert again == {tmp_path / "out" / "b.bin", tmp_path / "out" / "sub/e.bin"}
    # Other settings, or other content of the same size: not the same output.
    for change in (["--no-append-eod"], []):
        if not change:
            content = bytearray((shards / "a.jsonl").read_bytes())
            content[11:13] = b"XY"
            (shards / "a.jsonl").write_bytes(content)
        code, _, err = run("--input", shards, "--output-dir", tmp_path / "out", *change)
        assert (code, err) == (
            2, f"error: {tmp_path}/out/a.bin exists, made from other input or settings: pass --overwrite or another "
            "output\n",
        )  # fmt: skip
    assert run("--input", shards, "--output-dir", tmp_path / "out", "--overwrite")[0] == 0


def test_a_damaged_output_is_made_again(run, shards, tmp_path):
    run("--input", shards, "--output-dir", tmp_path / "out")
    good = (tmp_path / "out/a.bin").read_bytes()
    (tmp_path / "out/a.bin").write_bytes(bytes(len(good)))
    assert "4 of them done before" in run("--input", shards, "--output-dir", tmp_path / "out", "--overwrite")[1]
    assert (tmp_path / "out/a.bin").read_bytes() == good


def test_the_same_command_twice_does_nothing_the_second_time(run, shards, tmp_path):
    run("--input", shards, "--output-prefix", tmp_path / "one")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("one*")}
    assert run("--input", shards, "--output-prefix", tmp_path / "one")[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("one*")} == before


def test_a_bad_shard_keeps_the_finished_ones_for_the_next_try(run, shards, tmp_path):
    good = (shards / "sub/e.jsonl").read_bytes()
    (shards / "sub/e.jsonl").write_bytes(good + b"{bad\n")
    code, _, err = run("--input", shards, "--output-prefix", tmp_path / "one", "--max-bad-lines", "0")
    assert code == 2
    assert err.startswith(f"error: {shards}/sub/e.jsonl:9: invalid JSON at column 2")
    assert sorted(p.stem for p in (tmp_path / "one.shards").rglob("*.json")) == ["a", "b", "c", "d"]
    assert not (tmp_path / "one.bin").exists()
    (shards / "sub/e.jsonl").write_bytes(good)
    assert run("--input", shards, "--output-prefix", tmp_path / "one")[0] == 0
    assert not (tmp_path / "one.shards").exists()


def test_bad_lines_of_all_shards_are_listed_together(run, shards, tmp_path):
    for name in ("a.jsonl", "sub/e.jsonl"):
        with open(shards / name, "ab") as stream:
            stream.write(b"{bad\n")
    code, out, _ = run("--input", shards, "--output-prefix", tmp_path / "one")
    assert code == 0
    assert "2 bad lines left out (listed in *.bad_lines.txt)" in out
    listed = (tmp_path / "one.bad_lines.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{shards}/a.jsonl:9", f"{shards}/sub/e.jsonl:9"]


def test_jobs_can_share_the_shards(run, shards, tmp_path):
    for part in ("0/2", "1/2"):
        assert run("--input", shards, "--output-dir", tmp_path / "out", "--part", part)[0] == 0
        if part == "0/2":
            made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.bin")}
            assert made == {"a.bin", "c.bin", "sub/e.bin"}
    assert "5 of them done before" in run("--input", shards, "--output-dir", tmp_path / "out")[1]
    code, _, err = run("--input", shards, "--output-prefix", tmp_path / "one", "--part", "0/2")
    assert (code, err[:45]) == (2, "error: --part goes with --output-dir: jobs th")


def test_an_empty_shard_is_an_empty_pair(run, shards, tmp_path):
    (shards / "a.jsonl").write_bytes(b"\n")
    assert run("--input", shards, "--output-dir", tmp_path / "out")[0] == 0
    assert documents_of(tmp_path / "out" / "a") == []
    assert main(["merge", "--input", str(tmp_path / "out"), "--output-prefix", str(tmp_path / "all"), "--quiet"]) == 0
    assert len(documents_of(tmp_path / "all")) == 32


def test_which_files_an_input_means(shards, tmp_path):
    def names(*given):
        return [file.name for file in find_inputs(given)]

    assert names(shards) == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "sub/d.parquet", "sub/e.jsonl"]
    assert names(shards / "sub") == ["d.parquet", "e.jsonl"]
    assert names(shards / "a.jsonl", shards / "sub" / "d.parquet") == ["a.jsonl", "d.parquet"]
    assert names(f"{shards}/*.jsonl*") == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    assert names(f"{shards}/**/*.jsonl") == ["a.jsonl", "sub/e.jsonl"]
    assert [file.stem for file in find_inputs([shards])] == STEMS
    for given, message in (
        (f"{shards}/nothing*", "no file matches"),
        (shards / "README.md", "the ending tells no known format: .jsonl, "),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            names(given)
    with pytest.raises(UserError, match="two inputs are called a: rename one"):
        (shards / "a.parquet").write_bytes(b"")
        names(shards)
    assert set(inputs.SUFFIXES) >= {".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"}


def test_merged_sources_are_their_documents_in_order(demo, tmp_path, capsys):
    prefixes = [str(demo / domain) for domain in DOMAINS]
    merge = ["merge", "--quiet", "--input", *prefixes, "--output-prefix"]
    assert main([*merge, str(tmp_path / "all")]) == 0
    expected = [document for prefix in prefixes for document in documents_of(prefix)]
    assert documents_of(tmp_path / "all") == expected
    assert main(["validate", str(tmp_path / "all")]) == 0
    assert main([*merge, str(tmp_path / "shuffled"), "--shuffle-documents", "3"]) == 0
    shuffled = documents_of(tmp_path / "shuffled")
    assert sorted(shuffled) == sorted(expected) != shuffled
    tokenize = tokenize_files([CORPUS / f"{domain}.jsonl" for domain in DOMAINS], tmp_path / "text", demo / "tokenizer")
    merged = read_manifest(tmp_path / "all")
    assert (merged.num_tokens, merged.inputs) == (tokenize.num_tokens, tokenize.inputs)
    assert (tmp_path / "text.bin").read_bytes() == (tmp_path / "all.bin").read_bytes()
    assert (tmp_path / "text.idx").read_bytes() == (tmp_path / "all.idx").read_bytes()


def test_only_sources_made_alike_are_merged(demo, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(LINES)
    tokenize_files([tmp_path / "in.jsonl"], tmp_path / "other", demo / "tokenizer", append_eod=False)
    flags = ["--output-prefix", str(tmp_path / "all"), "--quiet"]
    assert main(["merge", "--input", str(demo / "books"), str(tmp_path / "other"), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/other has append_eod False, {demo}/books has True")
    (tmp_path / "other.json").unlink()
    assert main(["merge", "--input", str(tmp_path / "other"), *flags]) == 2
    assert "has no manifest, so its tokenizer is unknown" in capsys.readouterr().err
    assert main(["merge", "--input", str(tmp_path / "nowhere"), *flags]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/nowhere: no {tmp_path}/nowhere.idx; `hymba data tokenize` writes it\n"
    )
    assert not (tmp_path / "all.bin").exists()


def test_a_large_merge_copies_in_blocks(demo, tmp_path, monkeypatch):
    from data_prep import merge

    monkeypatch.setattr(merge, "BLOCK_TOKENS", 1000)  # many documents are longer, some shorter
    merge.merge_sources([demo / "docs", demo / "books"], tmp_path / "all")
    assert documents_of(tmp_path / "all") == documents_of(demo / "docs") + documents_of(demo / "books")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(run, shards, small_disk, workers, monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "CHUNK_BYTES", 1)
    many = b"".join(json.dumps({"text": f"{i} " * 300}).encode() + b"\n" for i in range(400))
    for name in ("a.jsonl", "sub/e.jsonl"):
        (shards / name).write_bytes(many)
    code, _, err = run("--input", shards, "--output-dir", small_disk / "out", "--workers", str(workers))
    assert code == 2
    assert err.count("\n") == 1
    assert "cannot be written after byte" in err
    assert "No space left on device" in err
    left = [path for path in small_disk.rglob("*") if path.is_file()]
    assert not [path for path in left if ".tmp-" in path.name]
    for path in left:  # shards that were done before the disk was full are whole
        assert main(["validate", str(path.with_suffix(""))]) == 0


def test_a_limit_on_file_size_is_one_line(demo, tmp_path):
    """What a quota does, without any mount."""
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "' + b"many words " * 200 + b'"}\n' * 1)
    (tmp_path / "in.jsonl").write_bytes((tmp_path / "in.jsonl").read_bytes() * 400)
    code = (
        "import resource, signal, sys\nfrom data_prep.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "tokenize", "--input", str(tmp_path / "in.jsonl"), "--workers", "1",
         "--tokenizer", str(demo / "tokenizer"), "--output-prefix", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/out.bin: cannot be written after byte ")
    assert "(File too large); nothing of it was kept" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_workers_and_keeps_finished_shards(demo, tmp_path, signum):
    """Ctrl-C, or a scheduler, in the middle of whole shards: exit code 130, one line, no temporary file."""
    (tmp_path / "in").mkdir()
    lines = (CORPUS / "books.jsonl").read_bytes()
    for number in range(12):
        (tmp_path / "in" / f"{number:02}.jsonl").write_bytes(lines * 10)
    command = [
        sys.executable, "-m", "hymba_train", "data", "tokenize", "--input", str(tmp_path / "in"), "--quiet",
        "--workers", "2", "--tokenizer", str(demo / "tokenizer"), "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 180
    while not list((tmp_path / "out").glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no shard came"
        time.sleep(0.02)
    os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "interrupted: unfinished output was removed, finished shards stay\n"
    finished = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert 0 < len(finished) < 12
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{stem}.{suffix}" for stem in finished for suffix in ("bin", "idx", "json")
    }


def test_a_document_of_a_megabyte_and_invalid_utf8(run, tmp_path, demo):
    text = "".join((CORPUS / f"{domain}.jsonl").read_text("utf-8") for domain in ("books", "code", "docs"))[: 2**20]
    assert len(text) == 2**20
    lines = [json.dumps({"text": text}).encode(), b'{"text": "\xe9"}', json.dumps({"text": ""}).encode()]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    code, out, _ = run("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--max-bad-lines", "1")
    assert code == 0
    assert "in 1 documents; 1 empty documents and 1 bad lines" in out
    tokenizer = Tokenizer.load(demo / "tokenizer")
    assert tokenizer.decode(IndexedTokens(tmp_path / "out").document(0)) == text
    assert np.array_equal(IndexedTokens(tmp_path / "out").document(0)[:-1], tokenizer.encode(text))
