"""Samples that are left out stay left out after a restart; a file that cannot be read is an error, not an empty one."""

import pytest

from hymba_train.errors import UserError
from hymba_train.guards.ledger import LEDGER, Ledger, LeftOut

BAD = LeftOut(phase=1, begin=80, end=88, step=11, reason="the loss is nan")


def test_another_process_reads_what_one_has_written(tmp_path):
    written = Ledger(tmp_path)
    written.add_rewind(BAD, write=True)
    read = Ledger(tmp_path)
    assert (read.left_out, read.num_rewinds) == ([BAD], 1)
    assert read.find(1, 87, 90) == BAD and read.find(1, 88, 90) is None and read.find(0, 80, 88) is None


def test_only_the_rank_that_writes_does(tmp_path):
    Ledger(tmp_path).add_rewind(BAD, write=False)
    assert not (tmp_path / LEDGER).exists()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"num_rewinds": 1}', '{"num_rewinds": 1, "left_out": [{"phase": 0}]}', "\ud800"]
)
def test_one_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / LEDGER).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"guards\.json: cannot be read .* repair it, or delete it"):
        Ledger(tmp_path)
