"""Megatron's .bin/.idx: read, written, and refused when damaged."""

import os

import numpy as np
import pytest

from hymba_train.data.indexed import HEADER, IndexedTokens, token_dtype
from hymba_train.data.indexed_writer import IndexedWriter
from hymba_train.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_round_trip(write_source, dtype):
    tokens = write_source("source", DOCUMENTS, dtype)
    assert (tokens.num_tokens, tokens.num_documents, tokens.dtype) == (10, 4, dtype)
    assert [tokens.document(d).tolist() for d in range(4)] == DOCUMENTS
    assert tokens.tokens(2, 6).tolist() == [7, 8, 9, 10]
    assert tokens.tokens(2, 6).dtype == np.int64
    assert [tokens.document_at(t) for t in range(10)] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    assert tokens.document_starts(0, 10).tolist() == [0, 3, 4, 8]
    assert tokens.document_starts(1, 8).tolist() == [3, 4]
    assert tokens.document_starts(5, 8).tolist() == []
    tokens.verify()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_our_files_and_writes_the_same_bytes(write_source, tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    write_source("ours", DOCUMENTS, dtype)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs[0].dtype == dtype

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"theirs.{suffix}").read_bytes() == (tmp_path / f"ours.{suffix}").read_bytes()


def test_megatron_documents_of_several_sequences_and_empty_ones(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(np.array([], dtype=np.int64), [0])
    builder.add_document(np.array([6, 7]), [1, 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    tokens = IndexedTokens(tmp_path / "theirs")
    assert (tokens.num_sequences, tokens.num_documents) == (5, 3)
    assert [tokens.document(d).tolist() for d in range(3)] == [[1, 2, 3, 4, 5], [], [6, 7]]
    assert tokens.document_starts(0, 7).tolist() == [0, 5]
    assert [tokens.document_at(t) for t in range(7)] == [0] * 5 + [2] * 2
    tokens.verify()


def test_dtype_follows_megatrons_rule():
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (4096, 65499, 65500, 128000):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_truncated_bin_names_file_and_sizes(write_source, tmp_path):
    write_source("source", DOCUMENTS)
    os.truncate(tmp_path / "source.bin", 17)
    with pytest.raises(UserError) as caught:
        IndexedTokens(tmp_path / "source")
    assert str(caught.value) == (
        f"{tmp_path}/source.bin has 17 bytes, but {tmp_path}/source.idx describes 20 (10 tokens of uint16): "
        "copy or tokenise it again"
    )


def test_truncated_idx_names_file_and_sizes(write_source, tmp_path):
    write_source("source", DOCUMENTS)
    size = (tmp_path / "source.idx").stat().st_size
    os.truncate(tmp_path / "source.idx", size - 8)
    with pytest.raises(UserError, match=rf"source.idx has {size - 8} bytes, but its header describes {size}"):
        IndexedTokens(tmp_path / "source")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "is not a Megatron index"),
        (b"something else altogether, long enough to be a header", "is not a Megatron index"),
        (HEADER.pack(b"MMIDIDX\0\0", 2, 8, 0, 1) + bytes(8), "version 2, dtype code 8; known are"),
        (HEADER.pack(b"MMIDIDX\0\0", 1, 77, 0, 1) + bytes(8), "version 1, dtype code 77; known are"),
        (HEADER.pack(b"MMIDIDX\0\0", 1, 8, 2**40, 1) + bytes(8), "its header describes"),
    ],
)
def test_wrong_idx_is_one_line(tmp_path, header, message):
    (tmp_path / "source.bin").write_bytes(b"\0\0")
    (tmp_path / "source.idx").write_bytes(header)
    with pytest.raises(UserError) as caught:
        IndexedTokens(tmp_path / "source")
    assert message in str(caught.value)
    assert "source.idx" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"source.bin does not exist; `hymba data tokenize` writes it"):
        IndexedTokens(tmp_path / "source")


def test_index_with_a_shifted_pointer_fails_verify(write_source, tmp_path):
    write_source("source", DOCUMENTS)
    content = bytearray((tmp_path / "source.idx").read_bytes())
    pointers = HEADER.size + 4 * len(DOCUMENTS)
    content[pointers + 8] += 2  # second sequence
    (tmp_path / "source.idx").write_bytes(content)
    with pytest.raises(UserError, match="sequence 1 does not start where the one before it ends"):
        IndexedTokens(tmp_path / "source").verify()


def test_index_with_documents_out_of_order_fails_verify(write_source, tmp_path):
    write_source("source", DOCUMENTS)
    content = bytearray((tmp_path / "source.idx").read_bytes())
    content[HEADER.size + 12 * len(DOCUMENTS) + 8] = 4  # document 1 begins at sequence 4, document 2 at 2
    (tmp_path / "source.idx").write_bytes(content)
    with pytest.raises(UserError, match="document border 2 lies before"):
        IndexedTokens(tmp_path / "source").verify()


def test_no_documents_at_all(write_source):
    tokens = write_source("source", [])
    assert (tokens.num_tokens, tokens.num_documents) == (0, 0)
    tokens.verify()


def test_an_error_while_writing_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "source", np.uint16) as writer:
        writer.add_documents(np.array([1, 2]), np.array([2]))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_reading_outside_is_an_error(write_source):
    tokens = write_source("source", DOCUMENTS)
    for begin, end in ((-1, 3), (4, 11), (5, 4)):
        with pytest.raises(IndexError):
            tokens.tokens(begin, end)
    with pytest.raises(IndexError):
        tokens.document(4)
    with pytest.raises(IndexError):
        tokens.document_at(10)
