"""Known noise is silenced, and nothing else."""

from __future__ import annotations

import logging
import warnings

from hymba_train.train.quiet import LOG_LINES, silence


def test_named_warnings_go_and_others_stay():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence()
        warnings.warn("Transformer Engine and Apex are not installed. Falling back.", stacklevel=1)
        warnings.warn("`torch.distributed.reduce_scatter_tensor` is deprecated.", FutureWarning, stacklevel=1)
        warnings.warn("gradients are not finite", stacklevel=1)
    assert [str(w.message) for w in seen] == ["gradients are not finite"]


def test_named_log_lines_go_and_others_stay(caplog):
    silence()
    silence()
    for name, text, _ in LOG_LINES:
        log = logging.getLogger(name)
        log.warning("something: %s", text)
        log.warning("disk is full")
    assert [r.getMessage() for r in caplog.records] == ["disk is full"] * len(LOG_LINES)
    assert all(len(logging.getLogger(name).filters) == 1 for name, _, _ in LOG_LINES)
