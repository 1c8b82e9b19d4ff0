"""manifest.json: size and checksum of every file of a step directory, which a checkpoint is verified against; and
tensors.json, covered by it: place and checksum of every tensor in the files, so that damage is named by tensor.

XXH3-128 finds every accident (a flipped bit, a torn or lost write, another file's content); it is no signature: whoever
can write the checkpoint can write the manifest. Free of torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
TENSORS = "tensors.json"
ALGORITHM = "xxh3_128"
CHUNK_BYTES = 8 << 20

# (path -> size and mtime of each file) of directories that this process has hashed completely. Looking at a directory
# again then costs a stat per file; a file that was touched since is read again.
_verified: dict[Path, dict[str, tuple[int, int]]] = {}


@dataclass(frozen=True)
class Entry:
    """What a file must be: its length, and the XXH3-128 of its content in hexadecimal."""

    num_bytes: int
    xxh3_128: str


def file_names(directory: Path) -> list[str]:
    """Names of the files that a manifest covers, relative to ``directory``: all but the manifest itself.

    Raises OSError if the directory cannot be read.
    """
    walk = os.walk(directory, onerror=_raise)  # rglob leaves out what it cannot read, in some versions of Python
    names = (Path(place, name).relative_to(directory).as_posix() for place, _, files in walk for name in files)
    # .nfsXXXX is a file that was deleted while another machine had it open
    return sorted(n for n in names if n != MANIFEST and not n.startswith(".nfs"))


def _raise(error: OSError) -> None:
    raise error


def share(sizes: dict[str, int], rank: int, num_ranks: int) -> list[str]:
    """Names of the files that ``rank`` hashes: large files first, dealt out like cards."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[rank::num_ranks]


def hash_file(path: Path) -> Entry:
    """Read a file once, in pieces. Raises OSError."""
    state, num_bytes, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            num_bytes += count
    return Entry(num_bytes, state.hexdigest())


def make(directory: Path) -> dict[str, Entry]:
    """Hash every file of a directory."""
    return {name: hash_file(directory / name) for name in file_names(directory)}


def write(directory: Path, entries: dict[str, Entry]) -> None:
    """Write the manifest of a step directory that is not published yet."""
    (directory / MANIFEST).write_text(_render(entries), encoding="utf-8")


def write_tensors(directory: Path, tensors: dict[str, list[tuple[str, int, int, str]]]) -> None:
    """Write tensors.json: for each file (name, offset, bytes, XXH3-128 of those bytes) of what it holds."""
    (directory / TENSORS).write_text(json.dumps(tensors, indent=0) + "\n", encoding="utf-8")


def damaged_tensors(path: Path) -> list[str]:
    """Names of the tensors in a file that are not as they were written; empty where tensors.json does not say."""
    try:
        tensors = json.loads((path.parent / TENSORS).read_bytes())[path.name]
        damaged = []
        with open(path, "rb") as file:
            for name, offset, num_bytes, checksum in tensors:
                file.seek(offset)
                if xxhash.xxh3_128_hexdigest(file.read(num_bytes)) != checksum:
                    damaged.append(name)
        return damaged
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read(directory: Path) -> dict[str, Entry]:
    """Read the manifest. Raises ValueError, one line naming the file, if it is missing or not as it was written."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): the checkpoint cannot be verified") from error
    try:
        entries = {name: Entry(**entry) for name, entry in json.loads(content)["files"].items()}
        intact = content == _render(entries).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{path}: is damaged (it does not match its own checksum)")
    return entries


def _render(entries: dict[str, Entry]) -> str:
    files = {name: asdict(entry) for name, entry in sorted(entries.items())}
    own = xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())
    return json.dumps({"algorithm": ALGORITHM, "files": files, "checksum_of_files": own}, indent=1) + "\n"


def compare(directory: Path, entries: dict[str, Entry], names: list[str]) -> list[str]:
    """Hold the named files to their entries; a line for each that differs, with its path."""
    problems = []
    for name in names:
        expected, path = entries[name], directory / name
        try:
            size = path.stat().st_size
            if size != expected.num_bytes:
                problems.append(f"{path}: has {size} bytes, {MANIFEST} says {expected.num_bytes}{_in_tensors(path)}")
            elif (found := hash_file(path)) != expected:
                problems.append(
                    f"{path}: is damaged: checksum {found.xxh3_128}, {MANIFEST} says {expected.xxh3_128}"
                    f"{_in_tensors(path)}"
                )
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
    return problems


def _in_tensors(path: Path) -> str:
    names = damaged_tensors(path)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" (in {', '.join(names[:3])}{more})" if names else ""


def unexpected(directory: Path, entries: dict[str, Entry]) -> list[str]:
    """A line for each file that the manifest does not know, which a loader might look into, and for each link."""
    names = file_names(directory)
    foreign = [f"{directory / name}: is not in {MANIFEST}" for name in names if name not in entries]
    links = [p for p in (directory, *directory.rglob("*")) if p.is_symlink() and p.name != ".nfs"]
    return foreign + [f"{path}: is a link; a checkpoint consists of plain files" for path in links]


def verify(directory: Path) -> list[str]:
    """Everything that is wrong with a step directory, one line a file; nothing if it is as it was published.

    A directory that this process has hashed before, and whose files have kept size and time, is not read again.
    """
    if is_remembered(directory):
        return []
    try:
        entries = read(directory)
    except ValueError as error:
        return [str(error)]
    problems = unexpected(directory, entries) + compare(directory, entries, sorted(entries))
    if not problems:
        remember(directory)
    return problems


def remember(directory: Path) -> None:
    """Note that all files of a directory have just been read and are as its manifest says."""
    found = _look(directory)
    if found is None:
        _verified.pop(directory, None)
    else:
        _verified[directory] = found


def is_remembered(directory: Path) -> bool:
    """Whether a directory was hashed by this process and has not been touched since, going by sizes and times."""
    return directory in _verified and _verified[directory] == _look(directory)


def _look(directory: Path) -> dict[str, tuple[int, int]] | None:
    """Size and time of every file; None if they cannot be looked at."""
    try:
        found = {name: (directory / name).stat() for name in (MANIFEST, *file_names(directory))}
    except OSError:
        return None
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}
