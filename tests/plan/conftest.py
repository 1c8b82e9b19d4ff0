import pytest


@pytest.fixture
def demo_data(tmp_path):
    """A directory with the files that experiment=demo names; empty, for plan only looks whether they are there."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    for source in ("books", "speeches", "docs", "code"):
        (tmp_path / f"{source}.bin").touch()
        (tmp_path / f"{source}.idx").touch()
    return tmp_path
