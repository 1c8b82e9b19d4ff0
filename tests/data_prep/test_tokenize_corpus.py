"""JSON lines to tokens: order, completeness, and one clear line for every kind of bad input."""

import gzip
import json

import numpy as np
import pytest

from data_prep import progress as progress_module
from data_prep import records, tokenize_corpus, tokenize_shard
from data_prep.cli import main
from data_prep.demo import CORPUS, DOMAINS
from data_prep.tokenize_corpus import tokenize_files
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.manifest import file_sha256, read_manifest, spot_hashes
from hymba_train.data.tokenizer import Tokenizer

TEXTS = ["First document.", "Second,\nof two lines.", "", "Fourth: \u00e9\u4e2d\U0001f600", "Fifth"]
GOOD = json.dumps({"text": "good"}).encode()


@pytest.fixture
def tokenizer(demo) -> Tokenizer:
    return Tokenizer.load(demo / "tokenizer")


@pytest.fixture
def run(demo, tmp_path, capsys):
    """run(content, *flags) -> (exit code, standard output, standard error); output prefix tmp_path / 'out'."""

    def run_cli(content: bytes, *flags: str, name: str = "in.jsonl") -> tuple[int, str, str]:
        (tmp_path / name).write_bytes(content)
        code = main(
            ["tokenize", "--input", str(tmp_path / name), "--output-prefix", str(tmp_path / "out"),
             "--tokenizer", str(demo / "tokenizer"), "--workers", "1", *flags]
        )  # fmt: skip
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_cli


def jsonl(texts, key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text}).encode() + b"\n" for text in texts)


def left_behind(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "in.jsonl")


def test_documents_come_out_in_order_each_with_its_end(run, tmp_path, tokenizer):
    code, out, err = run(jsonl(TEXTS))
    assert (code, err) == (0, "")
    tokens = IndexedTokens(tmp_path / "out")
    kept = [text for text in TEXTS if text]
    assert tokens.num_documents == len(kept)
    for number, text in enumerate(kept):
        assert tokens.document(number).tolist() == [*tokenizer.encode(text), tokenizer.eod_id]
    assert "4 documents; 1 empty documents and 0 bad lines left out" in out
    assert left_behind(tmp_path) == ["out.bin", "out.idx", "out.json"]


def test_without_end_of_document(run, tmp_path, tokenizer):
    assert run(jsonl(TEXTS), "--no-append-eod")[0] == 0
    assert IndexedTokens(tmp_path / "out").document(0).tolist() == tokenizer.encode(TEXTS[0])
    assert read_manifest(tmp_path / "out").append_eod is False


def test_manifest_tells_what_was_done(run, tmp_path, tokenizer):
    content = jsonl(TEXTS)
    run(content)
    manifest = read_manifest(tmp_path / "out")
    tokens = IndexedTokens(tmp_path / "out")
    assert (manifest.num_tokens, manifest.num_documents, manifest.dtype) == (tokens.num_tokens, 4, "uint16")
    assert manifest.max_token_id == tokens.tokens(0, tokens.num_tokens).max()
    assert manifest.tokenizer == {
        "name": "tokenizer.json", "sha256": tokenizer.content_hash, "vocab_size": 4096, "eod_id": 2,
    }  # fmt: skip
    assert manifest.num_empty_documents == 1
    assert manifest.inputs == [
        {
            "name": "in.jsonl", "records": 5, "bytes": len(content), "sha256": file_sha256(tmp_path / "in.jsonl"),
            "text_bytes": sum(len(text.encode()) for text in TEXTS),
        }
    ]  # fmt: skip
    for suffix in ("bin", "idx"):
        path = tmp_path / f"out.{suffix}"
        assert manifest.files[path.name] == {
            "bytes": path.stat().st_size, "sha256": file_sha256(path), "spots": spot_hashes(path),
        }  # fmt: skip
    assert manifest.backend == "tokenizers"
    assert set(manifest.versions) == {"python", "hymba_train", "numpy", "tokenizers"}


def test_result_does_not_depend_on_the_number_of_workers(demo, tmp_path, monkeypatch):
    for module in (records, tokenize_corpus):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2**16)  # many chunks, more than wait at one time
    inputs = [CORPUS / f"{domain}.jsonl" for domain in DOMAINS]
    manifests = [
        tokenize_files(inputs, tmp_path / f"out{workers}" / "all", demo / "tokenizer", num_workers=workers)
        for workers in (1, 2)
    ]
    assert manifests[0] == manifests[1]
    for suffix in ("bin", "idx", "json"):
        one, two = (tmp_path / f"out{workers}" / f"all.{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    parts = [IndexedTokens(demo / domain) for domain in DOMAINS]
    joined = np.concatenate([part.tokens(0, part.num_tokens) for part in parts])
    whole = IndexedTokens(tmp_path / "out2" / "all")
    assert np.array_equal(whole.tokens(0, whole.num_tokens), joined)


def test_a_worker_error_is_the_parents_error(demo, tmp_path, capsys):
    source = tmp_path / "long.jsonl"
    lines = (CORPUS / "books.jsonl").read_bytes() * 5
    source.write_bytes(lines + b"{bad\n" + lines)
    args = ["--tokenizer", str(demo / "tokenizer"), "--output-prefix", str(tmp_path / "out"), "--workers", "2",
            "--max-bad-lines", "0"]  # fmt: skip
    assert main(["tokenize", "--input", str(source), *args]) == 2
    assert capsys.readouterr().err.startswith(f"error: {source}:241: invalid JSON at column 2")
    assert left_behind(tmp_path) == ["long.jsonl"]


def test_gzip_input_gives_the_same_files(run, tmp_path):
    run(jsonl(TEXTS))
    plain = [(tmp_path / f"out.{suffix}").read_bytes() for suffix in ("bin", "idx")]
    assert run(gzip.compress(jsonl(TEXTS)), "--overwrite", name="in.jsonl.gz")[0] == 0
    assert [(tmp_path / f"out.{suffix}").read_bytes() for suffix in ("bin", "idx")] == plain


@pytest.mark.parametrize("damage", [lambda gz: gz[:-20], lambda gz: gz[:40] + b"\xff" * 20 + gz[60:], lambda gz: b"x"])
def test_damaged_gzip_is_named(run, tmp_path, damage):
    code, _, err = run(damage(gzip.compress(jsonl(TEXTS * 100))), name="in.jsonl.gz")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/in.jsonl.gz: cannot be read after line 0: ")
    assert err.count("\n") == 1
    assert left_behind(tmp_path) == ["in.jsonl.gz"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut off', "invalid JSON at column 10 (Unterminated string starting at)"),
        (b"not json", "invalid JSON at column 1 (Expecting value)"),
        (b'{"text": "\xff\xfe"}', "invalid UTF-8 at byte 10 of the line"),
        (b'{"body": "other key"}', "not a JSON object with the key 'text'"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": 3}', "the value of 'text' is not a string but int"),
        (b'{"text": null}', "the value of 'text' is not a string but NoneType"),
        (rb'{"text": "ab\ud83d"}', "character 2 of the text is half of a surrogate pair"),
        (b"[" * 100_000, "JSON is nested too deeply"),
    ],
)
def test_a_bad_line_is_listed_and_ends_the_run_if_asked(run, tmp_path, line, reason):
    content = b"\n".join([GOOD, b"", line, GOOD])
    code, _, err = run(content, "--max-bad-lines", "0")
    assert code == 2
    assert err == f"error: {tmp_path}/in.jsonl:3: {reason}; mend the input, or allow more than --max-bad-lines 0\n"
    assert left_behind(tmp_path) == []
    code, out, _ = run(content)
    assert code == 0
    assert "2 documents; 0 empty documents and 1 bad lines left out (listed in *.bad_lines.txt)" in out
    assert (tmp_path / "out.bad_lines.txt").read_text() == f"{tmp_path}/in.jsonl:3: {reason}\n"


def test_as_many_bad_lines_as_allowed_are_listed(run, tmp_path):
    code, out, err = run(b"\n".join([GOOD, b"{bad", GOOD, b"\xff", GOOD]), "--max-bad-lines", "2")
    assert (code, err) == (0, "")
    assert (tmp_path / "out.bad_lines.txt").read_text().splitlines() == [
        f"{tmp_path}/in.jsonl:2: invalid JSON at column 2 (Expecting property name enclosed in double quotes)",
        f"{tmp_path}/in.jsonl:4: invalid UTF-8 at byte 0 of the line",
    ]
    assert "2 bad lines left out (listed in *.bad_lines.txt)" in out
    assert IndexedTokens(tmp_path / "out").num_documents == 3
    assert read_manifest(tmp_path / "out").num_bad_lines == 2


def test_any_number_of_bad_lines_is_passed_over_and_the_list_goes_with_the_output(run, tmp_path):
    assert run(b"{bad\n" * 50 + GOOD)[0] == 0
    assert len((tmp_path / "out.bad_lines.txt").read_text().splitlines()) == 50
    assert run(GOOD, "--overwrite")[0] == 0
    assert left_behind(tmp_path) == ["out.bin", "out.idx", "out.json"]


def test_one_bad_line_more_than_allowed(run, tmp_path):
    code, _, err = run(b"\n".join([b"{bad", GOOD, b"{bad"]), "--max-bad-lines", "1")
    assert code == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == [f"{tmp_path}/in.jsonl:1", f"{tmp_path}/in.jsonl:3"]


def test_very_many_bad_lines_are_cut_short(run):
    code, _, err = run(b"{bad\n" * 500, "--max-bad-lines", "0")
    assert code == 2
    assert len(err.splitlines()) == 20
    assert "(and 480 more so far)" in err


def test_bad_lines_alone_are_an_error_that_shows_the_first(run, tmp_path):
    code, _, err = run(b'{"body": "x"}\n' * 3)
    assert code == 2
    assert err == (
        f"error: {tmp_path}/in.jsonl: no document with any text under 'text'; 3 bad lines, the first is "
        f"{tmp_path}/in.jsonl:1: not a JSON object with the key 'text'\n"
    )
    assert left_behind(tmp_path) == []


def test_a_shard_that_begins_with_nothing_but_bad_lines_is_given_up(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_shard, "HOPELESS_BAD_LINES", 100)
    monkeypatch.setattr(records, "CHUNK_BYTES", 500)
    code, _, err = run(b"{bad\n" * 5000 + GOOD)
    assert code == 2
    assert err.count("\n") == 1
    shown = int(err.partition("; ")[2].partition(" bad lines")[0])
    assert 100 <= shown < 300, "it does not read on"
    assert run(GOOD + b"\n" + b"{bad\n" * 5000)[0] == 0


def test_blank_lines_and_a_missing_last_newline_are_fine(run, tmp_path):
    assert run(b"\n" + GOOD + b"\n  \n" + GOOD)[0] == 0
    assert IndexedTokens(tmp_path / "out").num_documents == 2


@pytest.mark.parametrize("content", [b"", b"\n\n", jsonl(["", ""])])
def test_no_document_at_all(run, tmp_path, content):
    code, _, err = run(content)
    assert (code, err) == (2, f"error: {tmp_path}/in.jsonl: no document with any text under 'text'\n")
    assert left_behind(tmp_path) == []


def test_missing_input(run, tmp_path, demo, capsys):
    args = ["--tokenizer", str(demo / "tokenizer"), "--output-prefix", str(tmp_path / "out")]
    assert main(["tokenize", "--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *args]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/a.jsonl does not exist\nerror: {tmp_path}/b.jsonl does not exist\n"
    )


def test_existing_output_is_not_replaced_unless_asked(run, tmp_path):
    run(jsonl(TEXTS))
    before = (tmp_path / "out.bin").read_bytes()
    code, _, err = run(jsonl(["other"]))
    assert code == 2
    assert err == (
        f"error: {tmp_path}/out.bin exists, made from other input or settings: pass --overwrite or another output\n"
    )
    assert (tmp_path / "out.bin").read_bytes() == before
    assert run(jsonl(["other"]), "--overwrite")[0] == 0
    assert IndexedTokens(tmp_path / "out").num_documents == 1


def test_a_failing_overwrite_keeps_the_old_files(run, tmp_path):
    run(jsonl(TEXTS))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    assert run(jsonl(TEXTS) + b"{bad", "--overwrite", "--max-bad-lines", "0")[0] == 2
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before


def test_another_key_and_several_keys(run, tmp_path, tokenizer):
    assert run(jsonl(["body text"], "body"), "--json-keys", "body")[0] == 0
    assert IndexedTokens(tmp_path / "out").document(0).tolist() == [*tokenizer.encode("body text"), 2]
    both = json.dumps({"title": "A title", "body": "A body"}).encode()
    assert run(both, "--json-keys", "title", "body")[0] == 0
    assert IndexedTokens(tmp_path / "out_title").document(0).tolist() == [*tokenizer.encode("A title"), 2]
    assert IndexedTokens(tmp_path / "out_body").document(0).tolist() == [*tokenizer.encode("A body"), 2]


def test_shuffled_documents_are_the_same_documents(run, tmp_path):
    texts = [f"document number {i}" for i in range(50)]
    run(jsonl(texts))
    plain = IndexedTokens(tmp_path / "out")
    in_order = [tuple(plain.document(d)) for d in range(50)]
    orders = []
    for seed in ("1", "1", "2"):
        run(jsonl(texts), "--shuffle-documents", seed, "--overwrite")
        shuffled = IndexedTokens(tmp_path / "out")
        orders.append([tuple(shuffled.document(d)) for d in range(50)])
    assert sorted(orders[0]) == sorted(in_order)
    assert orders[0] != in_order
    assert orders[0] == orders[1] != orders[2]
    assert main(["validate", str(tmp_path / "out")]) == 0
    assert left_behind(tmp_path) == ["out.bin", "out.idx", "out.json"]


def test_large_vocabularies_are_stored_as_int32(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    fast = Fast(WordLevel({"<unk>": 0, "</s>": 1, "large": 70_000}, unk_token="<unk>"))
    fast.pre_tokenizer = Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.jsonl").write_bytes(jsonl(["large words"]))
    manifest = tokenize_files([tmp_path / "in.jsonl"], tmp_path / "out", tmp_path)
    tokens = IndexedTokens(tmp_path / "out")
    assert tokens.dtype == np.int32
    assert tokens.document(0).tolist() == [70_000, 0, 1]
    assert manifest.max_token_id == 70_000


@pytest.mark.parametrize(("is_terminal", "expected"), [
    (True, "\r[#####...............]  25.0%  3.0 MB  1.5 MB/s  0:00:06 left"),  # once half a second is over
    (False, ""),  # in a log, a line a minute
])  # fmt: skip
def test_progress(capsys, monkeypatch, is_terminal, expected):
    clock = iter([0, 2, 70])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: is_terminal)
    with progress_module.Progress(total_bytes=4_000_000, show=True) as progress:
        progress.update(1_000_000, 3_000_000)
        assert capsys.readouterr().err.startswith(expected)
        progress.update(2_000_000, 14_000_000)
        assert "[##########..........]  50.0%  14.0 MB  0.2 MB/s  0:01:10 left" in capsys.readouterr().err
