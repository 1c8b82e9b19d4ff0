"""A shard is parsed by a quick library and hashed while it is read: neither may show in the result."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep import records
from data_prep.inputs import find_inputs
from data_prep.records import Chunk, ShardReader, parse_chunk, parse_line
from hymba_train.data.manifest import SPOT_BYTES, check_spots, file_sha256, spot_hashes
from hymba_train.errors import UserError

TEXTS = [f"document {i} " + "\u00e9\u4e2d\U0001f600" * i for i in range(300)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("text"), inner, max_size=3),
    max_leaves=6,
)
json_lines = st.builds(
    lambda value, ascii: json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass"), json_values,
    st.booleans(),
)  # fmt: skip
damaged_lines = st.builds(
    lambda line, place, byte: line[: place % (len(line) + 1)] + byte + line[place % (len(line) + 1) + 1 :],
    json_lines, st.integers(0, 10**6), st.binary(max_size=2),
)  # fmt: skip


@given(json_lines | damaged_lines | st.binary(max_size=20))
@example(rb'{"text": "\ud83d"}')
@example(rb'{"text": "\ud83d\ude00"}')
@example(b'{"text": "a", "text": "b"}')
@example(b'{"text": "a", "score": NaN}')
@example(b'{"text": "a", "id": 123456789012345678901234567890, "x": 1e999}')
@example(b'\xef\xbb\xbf{"text": "a"}')
@example(b'{"text": "a"} {"text": "b"}')
@example(b'{"text": "a\tb"}')
@example(b'{"text": "a\x00b"}')
@example(b'\x0b{"text": "a"}')
@example(b" \x0c\r")
@example(b'{"text": "\xed\xa0\xbd"}')
@example(b'"text"')
@example(b'{"text": {"text": "a"}}')
def test_the_quick_parser_finds_what_the_json_module_finds(line):
    line = line.replace(b"\n", b" ") + b"\n"
    parsed = parse_chunk(Chunk("in", 1, [line], False, 0), "text")
    if not line.strip():
        assert not parsed.texts
        assert not parsed.bad_lines
        return
    try:
        expected = parse_line(line.rstrip(b"\r\n"), "text")
    except ValueError as error:
        assert not parsed.texts
        assert parsed.bad_lines == [f"in:1: {error}"]
    else:
        assert parsed.texts == [expected]


def write_parquet(path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_bytes(LINES)),
        ("empty.jsonl", lambda path: path.write_bytes(b"")),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES))),
        ("padded.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES) + b"\0" * 300_000)),
        ("a.jsonl.zst", lambda path: path.write_bytes(zstandard.compress(LINES))),
        ("a.parquet", write_parquet),
    ],
)
def test_the_hash_of_the_bytes_read_is_the_hash_of_the_file(tmp_path, monkeypatch, name, write):
    monkeypatch.setattr(records, "CHUNK_BYTES", 2**12)
    monkeypatch.setattr(records, "BUFFER_BYTES", 2**14)
    write(tmp_path / name)
    reader = ShardReader(find_inputs([tmp_path / name])[0], "text")
    texts = [text for chunk in reader for text in parse_chunk(chunk, "text").texts]
    assert texts == ([] if name.startswith("empty") else TEXTS)
    assert reader.sha256 == file_sha256(tmp_path / name)
    assert reader.num_bytes == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("size", [1, 202, SPOT_BYTES, SPOT_BYTES + 1, 5 * SPOT_BYTES - 7, 16 * SPOT_BYTES])
def test_spots_of_a_small_file_cover_all_of_it(tmp_path, size):
    path = tmp_path / "small.bin"
    path.write_bytes(bytes(size))
    spots = spot_hashes(path)
    assert len(spots) == -(-size // SPOT_BYTES)
    for place in {0, size - 1, size // 2, size // 3, min(size - 1, SPOT_BYTES)}:
        path.write_bytes(bytes(size))
        check_spots(path, {"bytes": size, "spots": spots})
        with open(path, "r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        with pytest.raises(UserError, match="differs from its manifest"):
            check_spots(path, {"bytes": size, "spots": spots})


def test_a_large_file_has_sixteen_spots_its_ends_among_them(tmp_path):
    path = tmp_path / "large.bin"
    with open(path, "wb") as stream:
        stream.truncate(100 * SPOT_BYTES)
    offsets = [offset for offset, _ in spot_hashes(path)]
    assert len(offsets) == 16
    assert (offsets[0], offsets[-1]) == (0, 99 * SPOT_BYTES)
