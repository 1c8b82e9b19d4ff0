"""Models of the golden cases through transformers, and a small random one."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def small():
    """Change nothing in it."""
    from tests.hf_models import make_model

    return make_model()
