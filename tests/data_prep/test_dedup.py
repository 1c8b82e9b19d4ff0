"""Duplicates: equal ones all found, near ones as MinHash promises, the first of each cluster kept, bytes untouched."""

import gzip
import json
import random
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import main
from data_prep.duplicates import DedupSettings, ShardHashes, _shingles, find_duplicates, signatures_of

EXACT, NEAR = DedupSettings("exact"), DedupSettings("minhash")


def hashes_of(texts, dedup_settings=EXACT) -> ShardHashes:
    exact = np.array([[hash(text) & (2**63 - 1), len(text)] for text in texts], dtype=np.uint64).reshape(-1, 2)
    signatures = signatures_of(texts, dedup_settings) if dedup_settings.method == "minhash" else None
    return ShardHashes(np.arange(len(texts)), exact, signatures)


def words(rng, count) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def edited(rng, text, share) -> str:
    """``share`` of the words replaced."""
    changed = text.split()
    for place in rng.sample(range(len(changed)), round(share * len(changed))):
        changed[place] = f"x{rng.randrange(10**6)}"
    return " ".join(changed)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.sampled_from("abcdefgh"), max_size=60), cut=st.integers(0, 60))
def test_of_equal_texts_the_first_stays(texts, cut):
    shards = [hashes_of(texts[:cut]), hashes_of(texts[cut:])]
    same_as, similarity = find_duplicates(shards, EXACT)
    for place, text in enumerate(texts):
        first = texts.index(text)
        assert same_as[place] == (-1 if first == place else first)
        assert similarity[place] == (0 if first == place else 1)


def test_signatures_estimate_the_jaccard_similarity():
    rng = random.Random(1)
    text = " ".join(words(rng, 400))
    for share in (0.0, 0.01, 0.03, 0.1, 0.5):
        other = edited(rng, text, share)
        a, b = (set(_shingles(t, 5)) for t in (text, other))
        jaccard = len(a & b) / len(a | b)
        first, second = signatures_of([text, other], NEAR)
        assert abs((first == second).mean() - jaccard) < 4 * (jaccard * (1 - jaccard) / 112) ** 0.5 + 1e-9


def test_signatures_are_pinned():
    # Those of another version of the library would not fit together with these.
    assert signatures_of(["the quick brown fox jumps over the lazy dog"], NEAR)[0, :3].tolist() == PINNED
    one, two = signatures_of(["One two, THREE four five six", "one TWO three (four) five six"], NEAR)
    assert np.array_equal(one, two)


PINNED = [3745571858, 3298934994, 3190686803]


def test_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(2)
    originals = [" ".join(words(rng, 300)) for _ in range(200)]
    near = [edited(rng, text, 0.01) for text in originals]  # Jaccard about 0.9
    far = [edited(rng, text, 0.2) for text in originals]  # about 0.2
    same_as, similarity = find_duplicates([hashes_of(originals + near + far, NEAR)], NEAR)
    assert (same_as[:200] == -1).all()
    found = same_as[200:400] == np.arange(200)
    assert found.mean() > 0.95
    assert (similarity[200:400][found] >= NEAR.threshold).all()
    assert (same_as[400:] == -1).all()


def test_clusters_keep_their_first_document_whatever_joins_them():
    rng = random.Random(3)
    base = " ".join(words(rng, 300))
    chain = [base]
    for _ in range(4):
        chain.append(edited(rng, chain[-1], 0.01))
    texts = ["something else entirely, and long enough", *chain, chain[2], base]
    same_as, _ = find_duplicates([hashes_of(texts[:4], NEAR), hashes_of(texts[4:], NEAR)], NEAR)
    assert same_as.tolist() == [-1, -1, 1, 1, 1, 1, 1, 1]


def test_texts_without_words_are_duplicates_only_if_equal():
    texts = ["...", "!!!", "...", "\u2014", "a"]
    assert find_duplicates([hashes_of(texts, NEAR)], NEAR)[0].tolist() == [-1, -1, 0, -1, -1]


@pytest.fixture
def shards(tmp_path):
    """Three shards in three formats; document k of shard s says 's k', with duplicates across them."""
    directory = tmp_path / "in"
    directory.mkdir()
    rng = random.Random(4)
    body = {name: " ".join(words(rng, 200)) for name in "abcdef"}
    texts = [
        [body["a"], body["b"], body["a"]],
        [body["c"], body["b"]],
        [edited(rng, body["c"], 0.01), body["d"], body["d"]],
    ]
    lines = [[json.dumps({"n": i, "text": text}).encode() + b"\n" for i, text in enumerate(shard)] for shard in texts]
    (directory / "0.jsonl.gz").write_bytes(gzip.compress(b"\n" + b"".join(lines[0])))
    (directory / "1.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[1])))
    pq.write_table(pa.table({"n": [0, 1, 2], "text": texts[2]}), directory / "2.parquet")
    return directory, lines, texts


@pytest.mark.parametrize("workers", ["1", "2"])
def test_shards_come_out_in_their_formats_without_the_duplicates(shards, tmp_path, capsys, workers):
    directory, lines, texts = shards
    out = tmp_path / "out"
    command = ["dedup", "--input", str(directory), "--output-dir", str(out), "--workers", workers, "--quiet"]
    assert main([*command, "--method", "minhash"]) == 0
    assert "4 of 8 documents stay, 4 (50.0%) were duplicates" in capsys.readouterr().out
    assert gzip.decompress((out / "0.jsonl.gz").read_bytes()) == b"\n" + b"".join(lines[0][:2])
    assert zstandard.ZstdDecompressor().stream_reader((out / "1.jsonl.zst").open("rb")).read() == lines[1][0]
    assert pq.read_table(out / "2.parquet").to_pylist() == [{"n": 1, "text": texts[2][1]}]
    removed = [json.loads(line) for line in (out / "removed.jsonl").read_text().splitlines()]
    # Lines count from 1 (the first of shard 0 is blank), rows from 0.
    assert [(entry["document"], entry["duplicate_of"]) for entry in removed] == [
        ("0.jsonl.gz:4", "0.jsonl.gz:2"), ("1.jsonl.zst:2", "0.jsonl.gz:3"), ("2.parquet:0", "1.jsonl.zst:1"),
        ("2.parquet:2", "2.parquet:1"),
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == [
        "0.jsonl.gz", "1.jsonl.zst", "2.parquet", "dedup.json", "removed.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, small_disk, capsys, workers):
    (tmp_path / "in").mkdir()
    for shard in range(2):
        lines = [json.dumps({"text": f"{shard} {i} and some more words"}).encode() for i in range(500)]
        (tmp_path / "in" / f"{shard}.jsonl").write_bytes(b"\n".join(lines))
    command = ["dedup", "--input", str(tmp_path / "in"), "--output-dir", str(small_disk / "out"), "--quiet"]
    assert main([*command, "--method", "minhash", "--workers", workers]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written" in err
    assert list((small_disk / "out").iterdir()) == []


def test_exact_keeps_near_duplicates(shards, tmp_path, capsys):
    command = ["dedup", "--input", str(shards[0]), "--output-dir", str(tmp_path / "out"), "--quiet", "--workers", "1"]
    assert main(command) == 0
    assert "5 of 8 documents stay" in capsys.readouterr().out


def test_the_same_command_again_does_nothing_and_another_is_refused(shards, tmp_path, capsys):
    command = ["dedup", "--input", str(shards[0]), "--output-dir", str(tmp_path / "out"), "--quiet", "--workers", "1"]
    main(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    capsys.readouterr()
    assert main([*command, "--method", "minhash"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/out/dedup.json is of other input or settings")
    assert main([*command, "--method", "minhash", "--overwrite"]) == 0


def test_bad_lines_are_passed_on_or_end_it_if_asked(shards, tmp_path, capsys):
    (shards[0] / "3.jsonl").write_bytes(b'{bad\n{"text": "good"}\n')
    command = ["dedup", "--input", str(shards[0]), "--output-dir", str(tmp_path / "out"), "--quiet", "--workers", "1"]
    assert main([*command, "--max-bad-lines", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {shards[0]}/3.jsonl:1: invalid JSON at column 2")
    assert list((tmp_path / "out").iterdir()) == []
    assert main(command) == 0
    assert (tmp_path / "out/3.jsonl").read_bytes() == b'{bad\n{"text": "good"}\n'
    assert f"1 bad lines were passed on ({tmp_path}/out/dedup.json lists them)" in capsys.readouterr().out
    (line,) = json.loads((tmp_path / "out/dedup.json").read_text())["bad_lines"]
    assert line.startswith(f"{shards[0]}/3.jsonl:1: invalid JSON")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-hashes", "100"], "--num-hashes 100 is not a multiple of --num-bands 14"),
        (["--threshold", "1.5"], "--threshold 1.5: give a share above 0, at most 1"),
    ],
)
def test_bad_settings_are_one_line(shards, tmp_path, capsys, flags, message):
    command = ["dedup", "--input", str(shards[0]), "--output-dir", str(tmp_path / "out"), "--method", "minhash"]
    assert main([*command, *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_without_rensa_the_extra_is_named(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    command = ["dedup", "--input", str(shards[0]), "--output-dir", str(tmp_path / "out"), "--method", "minhash"]
    assert main(command) == 2
    assert capsys.readouterr().err == "error: MinHash needs the package rensa: pip install 'hymba-train[data]'\n"
