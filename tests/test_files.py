"""Files that are there whole or not at all."""

from __future__ import annotations

import os

import pytest

from hymba_train.files import make_private, replacing, write_atomically


def test_text_and_bytes_take_the_place_of_the_old(tmp_path):
    path = tmp_path / "a"
    for content, expected in (("é\n", b"\xc3\xa9\n"), (b"\0\1", b"\0\1")):
        write_atomically(path, content)
        assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done = []

    def note(name, original):
        def call(*args):
            done.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}")) if name == "fsync" else ""))
            return original(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    write_atomically(tmp_path / "a", "new")
    (first, temporary), *rest = done
    assert first == "fsync" and temporary.startswith("a.tmp-")
    assert rest == [("replace", ""), ("fsync", tmp_path.name)]


def test_private_directories(tmp_path):
    make_private(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
