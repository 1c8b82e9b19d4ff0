"""R7: whatever is damaged, retention leaves a checkpoint that loads."""

from __future__ import annotations

import pytest

from hymba_train.checkpoint import directory, manifest
from tests.checkpoint.test_directory import published
from tests.reliability.test_integrity import flip

pytestmark = pytest.mark.reliability


def steps(root) -> list[int]:
    return [directory.step_of(p) for p in directory.complete_steps(root)]


def damage(path, kind: str) -> None:
    if kind == "flipped":
        flip(path / "__0_0.distcp", 3)
    elif kind == "truncated":
        (path / "__0_0.distcp").write_bytes(b"")
    elif kind == "unlisted":
        (path / manifest.MANIFEST).unlink()
    else:
        (path / ".metadata").unlink()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "unlisted", "torn"])
@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_verified_checkpoint_stays(tmp_path, kind, keep_last):
    published(tmp_path, *range(10, 70, 10))
    for step in (40, 50, 60):
        damage(tmp_path / directory.step_name(step), kind)
    (tmp_path / "latest").write_text("")
    directory.prune(tmp_path, keep_last, keep_every=0)
    good = [p for p in directory.complete_steps(tmp_path) if not manifest.verify(p)]
    assert tmp_path / directory.step_name(30) in good


def test_nothing_more_is_kept_than_needed(tmp_path):
    published(tmp_path, *range(10, 70, 10))
    damage(tmp_path / directory.step_name(60), "flipped")
    directory.prune(tmp_path, keep_last=2, keep_every=0)
    assert steps(tmp_path) == [50, 60], "50 verifies: older ones are not needed"


def test_what_this_process_published_is_not_read_again(tmp_path, monkeypatch):
    published(tmp_path, 10, 20)
    monkeypatch.setattr(manifest, "hash_file", lambda path: pytest.fail(f"{path} was read again"))
    directory.prune(tmp_path, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [20]


def test_nothing_is_deleted_that_retention_could_not_verify_a_replacement_for(tmp_path):
    """Nothing verifies at all: only what the rule names may stay, and it does."""
    published(tmp_path, 10, 20)
    for step in (10, 20):
        damage(tmp_path / directory.step_name(step), "flipped")
    directory.prune(tmp_path, keep_last=1, keep_every=0)
    assert 20 in steps(tmp_path)
