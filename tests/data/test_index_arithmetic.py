"""Offsets, borders, windows and held-out parts against loops that count token by token, for any documents."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_train.data.indexed import HEADER, MAGIC, IndexedTokens, bin_path, idx_path
from hymba_train.data.indexed_writer import IndexedWriter
from hymba_train.data.windows import IGNORED_LABEL, Windows, mask_documents, split_held_out

DOCUMENTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=25)
"""Documents as Megatron may have them: each of some sequences, any of which may be empty."""
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def write_as_megatron(prefix: Path, documents: list[list[int]]) -> np.ndarray:
    """A pair whose documents have these lengths of sequences; token t is t. Returns the document of each token."""
    lengths = np.array([length for document in documents for length in document], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    borders = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    bin_path(prefix).write_bytes(np.arange(ends[-1], dtype=np.uint16).tobytes())
    header = HEADER.pack(MAGIC, 1, 8, lengths.size, borders.size)
    pointers = (ends - lengths) * 2
    idx_path(prefix).write_bytes(header + lengths.tobytes() + pointers.tobytes() + borders.tobytes())
    return np.repeat(np.arange(len(documents)), [sum(document) for document in documents])


@settings(max_examples=80, deadline=None)
@given(documents=DOCUMENTS, data=st.data())
def test_documents_and_tokens_find_each_other(documents, data):
    with TemporaryDirectory() as directory:
        owner = write_as_megatron(Path(directory, "source"), documents)
        tokens = IndexedTokens(Path(directory, "source"))
        tokens.verify()
        assert (tokens.num_tokens, tokens.num_documents) == (owner.size, len(documents))
        assert [tokens.document_at(t) for t in range(owner.size)] == owner.tolist()
        for d in range(len(documents)):
            assert tokens.document(d).tolist() == np.flatnonzero(owner == d).tolist()
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(documents))] * 2)))
        sizes = [sum(document) for document in documents]
        assert tokens.document_offsets(first, last).tolist() == np.cumsum([0, *sizes])[first : last + 1].tolist()
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, owner.size)] * 2)))
        starts = [t for t in range(begin, end) if t == 0 or owner[t] != owner[t - 1]]
        assert tokens.document_starts(begin, end).tolist() == starts
        assert tokens.tokens(begin, end).tolist() == list(range(begin, end))


def write_source(directory: str, sizes: list[int]) -> IndexedTokens:
    """Documents of these lengths; token t is t."""
    with IndexedWriter(Path(directory, "source"), np.uint16) as writer:
        writer.add_documents(np.arange(sum(sizes)), np.array(sizes))
        writer.publish()
    return IndexedTokens(Path(directory, "source"))


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, fraction=st.floats(0, 0.999))
def test_the_held_out_part_is_the_fewest_last_documents_with_its_share(sizes, fraction):
    with TemporaryDirectory() as directory:
        training, held_out = split_held_out(write_source(directory, sizes), fraction)
    total, wanted = sum(sizes), round(sum(sizes) * fraction)
    assert (training.begin, training.end, held_out.end) == (0, held_out.begin, total)
    assert (training.begin_document, training.end_document) == (0, held_out.begin_document)
    assert training.num_tokens == sum(sizes[: training.end_document])
    assert held_out.num_tokens >= (max(1, wanted) if fraction else 0)
    if held_out.num_documents > 1:
        assert sum(sizes[held_out.begin_document + 1 :]) < max(1, wanted), "one document fewer would be too few"


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, fraction=st.sampled_from([0.0, 0.2, 0.5]), seq_length=st.integers(1, 15))
def test_windows_predict_every_token_once_and_never_across_a_border(sizes, fraction, seq_length):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    with TemporaryDirectory() as directory:
        tokens = write_source(directory, sizes)
        for part in split_held_out(tokens, fraction):
            windows = Windows(part, seq_length)
            predicted: list[int] = []
            for number in range(len(windows)):
                window = windows.read(number)
                begin = windows.offset(number)
                assert window.tolist() == list(range(begin, begin + seq_length + 1))
                assert begin + seq_length < part.end
                masked = mask_documents(window, windows.borders(number))
                predicted += window[1:].tolist()
                for place, (token, following) in enumerate(pairwise(window.tolist())):
                    same = owner[token] == owner[following]
                    assert masked["labels"][place] == (following if same else IGNORED_LABEL)
                    assert masked["segment_ids"][place] == owner[token] - owner[begin]
                    first = max(begin, int(np.argmax(owner == owner[token])))
                    assert masked["positions"][place] == token - first
            covered = max(0, part.num_tokens - 1) // seq_length * seq_length
            assert predicted == list(range(part.begin + 1, part.begin + 1 + covered))
