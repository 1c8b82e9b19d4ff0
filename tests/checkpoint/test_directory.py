"""Published or not: pointers, torn directories, retention."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hymba_train.checkpoint import directory as d


def published(root: Path, *steps: int) -> None:
    for step in steps:
        path = d.start_step(root, step)
        fill(path, f"weights of {step}")
        d.publish(path)


def fill(path: Path, content: str = "x") -> None:
    for name in ("__0_0.distcp", ".metadata", "metadata.json", d.METADATA):
        (path / name).write_text(content)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_publish_renames_and_points_to_it(tmp_path):
    published(tmp_path, 5, 10)
    assert names(tmp_path) == ["latest", "step_0000005", "step_0000010"]
    assert (tmp_path / "latest").read_text() == "step_0000010\n"
    assert d.newest(tmp_path) == (tmp_path / "step_0000010", [])


def test_nothing_there_is_no_checkpoint(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        assert d.newest(root) == (None, [])
        assert not d.has_any(root)


@pytest.mark.parametrize("text", ["", "garbage\0", "step_0000099", "../step_0000005", "step_0000020.incomplete"])
def test_a_torn_pointer_gives_the_newest_complete_one(tmp_path, text):
    published(tmp_path, 5, 10)
    d.start_step(tmp_path, 20)
    (tmp_path / "latest").write_text(text)
    path, (remark,) = d.newest(tmp_path)
    assert path == tmp_path / "step_0000010"
    assert "latest" in remark and "step_0000010" in remark


def test_a_missing_pointer_gives_the_newest_complete_one(tmp_path):
    published(tmp_path, 5)
    (tmp_path / "latest").unlink()
    path, (remark,) = d.newest(tmp_path)
    assert path.name == "step_0000005" and "missing" in remark


@pytest.mark.parametrize("missing", [d.METADATA, "metadata.json", ".metadata"])
def test_an_incomplete_step_is_not_taken(tmp_path, missing):
    published(tmp_path, 5, 10)
    (tmp_path / "step_0000010" / missing).unlink()
    path, remarks = d.newest(tmp_path)
    assert path.name == "step_0000005" and remarks
    (tmp_path / "step_0000005" / missing).unlink()
    path, remarks = d.newest(tmp_path)
    assert path is None and d.has_any(tmp_path)


def test_the_pointer_wins_over_a_newer_directory(tmp_path):
    """Taking a run back: the user writes an older name into ``latest``."""
    published(tmp_path, 5, 10)
    (tmp_path / "latest").write_text("step_0000005\n")
    assert d.newest(tmp_path) == (tmp_path / "step_0000005", [])


def test_publishing_a_step_again_replaces_it_whole(tmp_path):
    published(tmp_path, 5, 10)
    (tmp_path / "step_0000005" / "old").write_text("old")
    published(tmp_path, 5)
    assert names(tmp_path) == ["latest", "step_0000005", "step_0000010"]
    assert not (tmp_path / "step_0000005" / "old").exists()


def test_start_step_never_reuses_a_directory(tmp_path):
    path = d.start_step(tmp_path, 5)
    fill(path, "half of a dead process's checkpoint")
    assert names(d.start_step(tmp_path, 5)) == []


def test_a_death_before_the_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    published(tmp_path, 5)
    path = d.start_step(tmp_path, 10)
    fill(path)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        d.publish(path)
    assert d.newest(tmp_path) == (tmp_path / "step_0000005", [])


def test_a_death_between_rename_and_pointer_resumes_from_the_pointer(tmp_path, monkeypatch):
    published(tmp_path, 5)
    path = d.start_step(tmp_path, 10)
    fill(path)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(d, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            d.publish(path)
    assert d.newest(tmp_path)[0].name == "step_0000005"
    published(tmp_path, 10)  # trained again
    assert d.newest(tmp_path)[0].name == "step_0000010"


def test_everything_is_fsynced_before_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, rename = d.fsync, os.rename
    monkeypatch.setattr(d, "fsync", lambda path: (order.append(path.name), fsync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    published(tmp_path, 5)
    before = order[: order.index("rename")]
    assert {"__0_0.distcp", ".metadata", "metadata.json", d.METADATA, "step_0000005.incomplete"} <= set(before)
    assert tmp_path.name in order[order.index("rename") :]


def test_retention_keeps_last_and_every(tmp_path):
    published(tmp_path, *range(10, 80, 10))
    gone = d.prune(tmp_path, keep_last=2, keep_every=30)
    assert [p.name for p in gone] == ["step_0000010", "step_0000020", "step_0000040", "step_0000050"]
    assert [d.step_of(p) for p in d.complete_steps(tmp_path)] == [30, 60, 70]


def test_retention_never_deletes_the_newest_complete_one(tmp_path):
    published(tmp_path, 10, 20, 30)
    for step in (20, 30):
        (tmp_path / d.step_name(step) / ".metadata").unlink()
    d.start_step(tmp_path, 40)
    assert d.prune(tmp_path, keep_last=0, keep_every=0) == []  # torn ones do not count towards keep_last
    assert [d.step_of(p) for p in d.complete_steps(tmp_path)] == [10]


def test_retention_keeps_what_latest_names(tmp_path):
    published(tmp_path, 10, 20, 30)
    (tmp_path / "latest").write_text("step_0000010\n")
    d.prune(tmp_path, keep_last=1, keep_every=0)
    assert [d.step_of(p) for p in d.complete_steps(tmp_path)] == [10, 30]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    published(tmp_path, 5)
    for name in ("step_0000010.incomplete", "step_0000005.deleted", "step_0000007.replaced", "mine.incomplete"):
        fill((tmp_path / name, (tmp_path / name).mkdir())[0])
    assert len(d.remove_leftovers(tmp_path)) == 3
    assert names(tmp_path) == ["latest", "mine.incomplete", "step_0000005"]


def test_step_names():
    assert d.step_of(Path("step_12345678")) == 12345678
    assert d.step_of(Path("step_0000005.incomplete")) is None and d.step_of(Path("step_5")) is None
