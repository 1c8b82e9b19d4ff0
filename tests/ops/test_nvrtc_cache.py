"""Where compiled kernels are kept; the compiler itself is not needed."""

import logging
import os

import pytest

from hymba_train.ops import nvrtc


@pytest.fixture
def compiled(monkeypatch):
    """Sources that were compiled."""
    sources = []
    monkeypatch.setattr(nvrtc, "_compiler_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, options: sources.append(source) or source.encode())
    return sources


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_kept_for_whom_the_umask_lets(tmp_path, monkeypatch, compiled, umask, mode):
    monkeypatch.setenv("HYMBA_KERNEL_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(umask)
    try:
        assert nvrtc.cached_cubin("kernel", []) == nvrtc.cached_cubin("kernel", []) == b"kernel"
    finally:
        os.umask(before)
    (file,) = (tmp_path / "new" / "cache").iterdir()
    assert file.stat().st_mode & 0o777 == mode and compiled == ["kernel"]


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(tmp_path, monkeypatch, compiled, caplog):
    """A file is in the way, which stops root as well."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYMBA_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        for source in ("one", "two"):
            assert nvrtc.cached_cubin(source, []) == source.encode()
    (record,) = caplog.records
    assert "file/cache: kernels cannot be kept there" in record.getMessage() and compiled == ["one", "two"]


def test_a_kept_kernel_that_cannot_be_read_is_compiled(tmp_path, monkeypatch, compiled, caplog):
    monkeypatch.setenv("HYMBA_KERNEL_CACHE", str(tmp_path))
    nvrtc.cached_cubin("kernel", [])
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    assert nvrtc.cached_cubin("kernel", []) == b"kernel" and compiled == ["kernel"] * 2
    assert list(tmp_path.iterdir()) == [file], "nothing half-written is left"
