"""Data of real form, prepared once a session."""

from __future__ import annotations

import pytest

from tests.instruct import tiny


@pytest.fixture(scope="session")
def instruct(tmp_path_factory):
    """Directory that :func:`tests.instruct.tiny.prepare` has filled. Change nothing in it but runs/."""
    directory = tmp_path_factory.mktemp("instruct")
    tiny.prepare(directory)
    return directory
