"""Sources on object stores and other remote file systems (fsspec URLs), through copies on a local disk.

A copy is complete, of the size and sha256 that the manifest beside the original says, or it is not there: it is
written under another name, checked while it is written, and renamed. It lies under a name made of the URL and the
manifest, so a source that has changed is another copy. Of the processes of one machine one fetches, the others wait
for it (flock, which ends with the process that holds it); `hymba data fetch` does it before the job starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hymba_train.data.extras import import_extra
from hymba_train.data.manifest import check_spots, manifest_path, parse_manifest
from hymba_train.data.user_files import write_or_refuse
from hymba_train.errors import UserError
from hymba_train.files import replacing, sync_and_close

logger = logging.getLogger(__name__)

COPY_BYTES = 2**23
PROGRESS_SECONDS = 30


def is_url(path: str | Path) -> bool:
    """Whether a path is an fsspec URL (``s3://bucket/...``) rather than a path of this machine."""
    return "://" in str(path)


def join(base: str | None, path: str) -> str:
    """``path``, taken from ``base`` when it is relative and there is a base. Either may be a URL."""
    if base is None or is_url(path) or os.path.isabs(path):
        return path
    return f"{base.rstrip('/')}/{path}" if is_url(base) else str(Path(base, path))


class Cache:
    """Local copies of remote files under one directory.

    Args:
        directory: on a local disk with room for all sources; made if missing.

    Every method raises UserError: URL unreadable, content other than its manifest says, storage full.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache={directory}: cannot be made ({error.strerror}): choose another") from error

    def source(self, url: str) -> str:
        """Local prefix of the .bin, .idx and .json of a source at the prefix ``url``."""
        content = read_bytes(f"{url}.json", "a source on a remote file system needs its manifest")
        manifest = parse_manifest(content, f"{url}.json")
        with self._place(url, content) as place:
            prefix = place / url.rsplit("/", 1)[-1]
            for suffix in (".bin", ".idx"):
                facts, path = manifest.file(suffix), Path(f"{prefix}{suffix}")
                if not _is_sound(path, facts):
                    self._fetch(f"{url}{suffix}", path, facts)
            if not manifest_path(prefix).is_file():
                write_or_refuse(manifest_path(prefix), content)
        return str(prefix)

    def file(self, url: str, verify: Callable[[Path], object] = lambda path: None) -> Path:
        """Local copy of one file without a manifest; ``verify`` raises UserError if its content is not whole.

        Another copy is made when the file system says that the file has changed (size, time, ETag).
        """
        with self._place(url, _version(url)) as place:
            path = place / url.rsplit("/", 1)[-1]
            if not path.is_file():
                self._fetch(url, path, None, verify)
        return path

    @contextlib.contextmanager
    def _place(self, url: str, identity: bytes) -> Iterator[Path]:
        """Directory of one version of one URL, held by this process alone."""
        key = hashlib.sha256(url.encode() + b"\0" + identity).hexdigest()[:20]
        place = self.directory / key
        place.mkdir(exist_ok=True)
        with open(self.directory / f"{key}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in place.glob("*.tmp-*"):  # of a process that was killed: nobody else is here now
                left_over.unlink()
            yield place

    def _fetch(
        self, url: str, path: Path, facts: dict[str, Any] | None, verify: Callable[[Path], object] = lambda path: None
    ) -> None:
        with replacing(path) as temporary:
            digest, num_bytes = _copy(url, temporary, facts["bytes"] if facts else None)
            if facts and (digest, num_bytes) != (facts["sha256"], facts["bytes"]):
                raise UserError(
                    f"{url} has {num_bytes} bytes and sha256 {digest}, its manifest says {facts['bytes']} and "
                    f"{facts['sha256']}: copy the source there again"
                )
            verify(temporary)


def read_bytes(url: str, purpose: str = "reading it") -> bytes:
    """All of a small remote file. Raises UserError naming the URL; ``purpose`` says why it is wanted."""
    with _remote(url, purpose), _open(url) as stream:
        return stream.read()


def exists(url: str) -> bool:
    """Whether there is a remote file. Raises UserError when the file system cannot be asked."""
    with _remote(url, "looking for it"):
        system, path = import_extra("fsspec", f"reading {url}").core.url_to_fs(url)
        return system.isfile(path)


def upload(path: str | Path, url: str) -> None:
    """Put a local file at a URL. Raises UserError."""
    with _remote(url, "writing it"):
        system, target = import_extra("fsspec", f"writing {url}").core.url_to_fs(url)
        system.put_file(str(path), target)


def _open(url: str) -> Any:
    return import_extra("fsspec", f"reading {url}").open(url, "rb")


def _version(url: str) -> bytes:
    with _remote(url, "reading it"):
        system, path = import_extra("fsspec", f"reading {url}").core.url_to_fs(url)
        return system.ukey(path).encode()


def _copy(url: str, path: Path, total_bytes: int | None) -> tuple[str, int]:
    """Copy a remote file. Returns (sha256, bytes)."""
    digest, num_bytes, last_seconds = hashlib.sha256(), 0, time.monotonic()
    with _remote(url, "copying it"), _open(url) as source, _writing(path, url) as target:
        while data := source.read(COPY_BYTES):
            digest.update(data)
            target.write(data)
            num_bytes += len(data)
            if time.monotonic() - last_seconds > PROGRESS_SECONDS:
                last_seconds = time.monotonic()
                of = f" of {total_bytes / 1e9:.1f}" if total_bytes else ""
                logger.info("fetching %s: %.1f%s GB", url, num_bytes / 1e9, of)
    return digest.hexdigest(), num_bytes


class _LocalFile:
    """A file being written whose errors cannot be taken for those of the remote side."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self.stream, self.url = stream, url

    def write(self, data: bytes) -> None:
        self._do(lambda: self.stream.write(data))

    def finish(self) -> None:
        self._do(lambda: sync_and_close(self.stream))

    def _do(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            raise UserError(
                f"{self.stream.name}: cannot be written ({error.strerror}) while copying {self.url}: make room, or set "
                "data.cache to another disk"
            ) from error


@contextlib.contextmanager
def _writing(path: Path, url: str) -> Iterator[_LocalFile]:
    stream = open(path, "wb")  # noqa: SIM115  closed below
    try:
        local = _LocalFile(stream, url)
        yield local
        local.finish()
    finally:
        with contextlib.suppress(OSError):  # a full disk says so once more
            stream.close()


def _is_sound(path: Path, facts: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    try:
        check_spots(path, facts)
    except UserError as problem:
        logger.warning("%s; fetching it again", problem)
        return False
    return True


@contextlib.contextmanager
def _remote(url: str, purpose: str) -> Iterator[None]:
    """File systems raise what they like; the user gets one line with the URL."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{url} does not exist ({purpose})") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{url}: {purpose} failed ({reason})") from error
