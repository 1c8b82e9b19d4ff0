"""Samples cut from tokens, the held-out split, and labels and positions under a document mask."""

import numpy as np
import pytest

from hymba_train.data.windows import TokenRange, Windows, mask_documents, split_held_out

EOD = 2
# Three documents, each ended by EOD: tokens 0..3, 4..5, 6..12.
DOCUMENTS = [[10, 11, 12, EOD], [20, EOD], [30, 31, 32, 33, 34, 35, EOD]]


def whole(tokens) -> TokenRange:
    return split_held_out(tokens, 0.0)[0]


def test_windows_share_one_token_with_their_neighbour(write_source):
    windows = Windows(whole(write_source("source", DOCUMENTS)), 4)
    assert len(windows) == 3
    assert [windows.read(i).tolist() for i in range(3)] == [
        [10, 11, 12, EOD, 20],
        [20, EOD, 30, 31, 32],
        [32, 33, 34, 35, EOD],
    ]


@pytest.mark.parametrize(("num_tokens", "seq_length", "expected"), [(13, 4, 3), (12, 4, 2), (5, 4, 1), (4, 4, 0)])
def test_number_of_windows(write_source, num_tokens, seq_length, expected):
    assert len(Windows(whole(write_source("source", [list(range(num_tokens))])), seq_length)) == expected


def test_outside_is_an_error(write_source):
    windows = Windows(whole(write_source("source", DOCUMENTS)), 4)
    for window in (-1, 3):
        with pytest.raises(IndexError):
            windows.read(window)


def test_a_part_reads_no_token_of_the_other(write_source):
    training, held_out = split_held_out(write_source("source", DOCUMENTS), 0.5)
    assert (training.num_tokens, training.num_documents, held_out.num_tokens, held_out.num_documents) == (6, 2, 7, 1)
    assert Windows(training, 5).read(0).tolist() == [10, 11, 12, EOD, 20, EOD]
    assert Windows(held_out, 3).read(1).tolist() == [33, 34, 35, EOD]


@pytest.mark.parametrize(
    ("fraction", "held_out_documents"),
    [(0.0, 0), (0.01, 1), (7 / 13, 1), (8 / 13, 2), (9 / 13, 2), (10 / 13, 3)],
)
def test_held_out_are_the_fewest_last_documents_with_the_share(write_source, fraction, held_out_documents):
    training, held_out = split_held_out(write_source("source", DOCUMENTS), fraction)
    assert held_out.num_documents == held_out_documents
    assert training.end == held_out.begin
    assert held_out.end == 13


def test_documents_are_kept_apart(write_source):
    windows = Windows(whole(write_source("source", DOCUMENTS)), 12)
    tokens = windows.read(0)
    masked = mask_documents(tokens, windows.borders(0))
    #                                10  11  12 EOD    20  EOD   30  31  32  33  34  35
    assert masked["labels"].tolist() == [11, 12, EOD, -100, EOD, -100, 31, 32, 33, 34, 35, EOD]
    assert masked["positions"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]
    assert masked["segment_ids"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert tokens.tolist()[1:5] == [11, 12, EOD, 20]  # the tokens themselves stay


def test_a_document_that_begins_behind_the_inputs_masks_the_last_label_only(write_source):
    windows = Windows(whole(write_source("source", DOCUMENTS)), 4)
    masked = mask_documents(windows.read(0), windows.borders(0))
    assert masked["labels"].tolist() == [11, 12, EOD, -100]
    assert masked["segment_ids"].tolist() == [0, 0, 0, 0]


def test_a_sample_that_begins_inside_a_document_counts_from_its_own_start(write_source):
    windows = Windows(whole(write_source("source", DOCUMENTS)), 5)
    masked = mask_documents(windows.read(0), windows.borders(0))  # 10 11 12 EOD 20 | EOD
    assert masked["positions"].tolist() == [0, 1, 2, 3, 0]
    masked = mask_documents(windows.read(1), windows.borders(1))  # EOD 30 31 32 33 | 34
    assert masked["labels"].tolist() == [-100, 31, 32, 33, 34]
    assert masked["positions"].tolist() == [0, 0, 1, 2, 3]
    assert masked["segment_ids"].tolist() == [0, 1, 1, 1, 1]


def test_a_document_that_begins_with_the_sample_is_segment_zero(write_source):
    windows = Windows(whole(write_source("source", [[1, 1, 1, EOD], [3, 4, 5, 6, 7]])), 4)
    masked = mask_documents(windows.read(1), windows.borders(1))
    assert masked["segment_ids"].tolist() == [0, 0, 0, 0]
    assert masked["labels"].tolist() == [4, 5, 6, 7]


def test_masking_without_borders_changes_nothing():
    tokens = np.arange(9)
    masked = mask_documents(tokens, np.array([], dtype=np.int64))
    assert masked["labels"].tolist() == list(range(1, 9))
    assert masked["positions"].tolist() == list(range(8))
    assert masked["segment_ids"].tolist() == [0] * 8
    assert all(array.dtype == np.int64 for array in masked.values())
