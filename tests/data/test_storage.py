"""Sources on remote file systems: copied whole and right, or not there; once a machine; named in every error."""

import json
import os
import shutil
import subprocess
import sys

import fsspec
import pytest

from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from hymba_train.data import storage
from hymba_train.data.build import build_training_data
from hymba_train.data.dataset import TrainingData
from hymba_train.errors import UserError

NAMES = ("books.bin", "books.idx", "books.json")


@pytest.fixture
def remote(demo):
    """URL of a bucket in memory with the tokenizer and one source."""
    system = fsspec.filesystem("memory")
    for name in (*NAMES, "tokenizer/tokenizer.json"):
        system.pipe_file(f"/bucket/{name}", (demo / name).read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def make_config(url, cache, **phase) -> DataConfig:
    values = dict(tokens=10_000, seq_length=64, global_batch_size=8, blend={"books": 1.0}) | phase
    return DataConfig(
        path=url, cache=None if cache is None else str(cache), tokenizer="tokenizer",
        sources={"books": SourceConfig("books", 0.05)}, phases={"main": PhaseConfig(**values)},
    )  # fmt: skip


def build(config: DataConfig) -> TrainingData:
    return build_training_data(config, seed=1, vocab_size=4096)


def problem(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        build(config)
    assert "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


def copies(cache) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_remote_data_are_the_same_data(demo, remote, tmp_path):
    here, there = build(make_config(str(demo), None)), build(make_config(remote, tmp_path / "cache"))
    for n in range(20):
        assert there.sample(0, n)["tokens"].tolist() == here.sample(0, n)["tokens"].tolist()
    assert there.identity() == here.identity()
    assert copies(tmp_path / "cache") == [*NAMES, "tokenizer.json"]


def test_a_copy_is_made_once(remote, tmp_path, monkeypatch):
    build(make_config(remote, tmp_path))
    monkeypatch.setattr(storage, "_copy", lambda *args: pytest.fail("copied again"))
    build(make_config(remote, tmp_path))


def test_changed_sources_and_tokenizers_are_fetched_anew(demo, remote, tmp_path):
    first = build(make_config(remote, tmp_path))
    system = fsspec.filesystem("memory")
    for name in ("bin", "idx", "json"):
        content = (demo / f"docs.{name}").read_bytes()
        system.pipe_file(f"/bucket/books.{name}", content.replace(b"docs.", b"books."))
    second = build(make_config(remote, tmp_path))
    assert second.sources["books"].training.num_documents != first.sources["books"].training.num_documents
    tokenizer = (demo / "tokenizer/tokenizer.json").read_bytes()
    system.pipe_file("/bucket/tokenizer/tokenizer.json", tokenizer.replace(b"0.", b"1.", 1)[: len(tokenizer)])
    other = bytearray(tokenizer)
    other[-1:] = b" "  # of the same size
    system.pipe_file("/bucket/tokenizer/tokenizer.json", bytes(other))
    assert "cannot be read as a tokenizer" in problem(make_config(remote, tmp_path))


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_remote_file_that_is_not_what_its_manifest_says(remote, tmp_path, name, damage):
    system = fsspec.filesystem("memory")
    content = system.cat_file(f"/bucket/{name}")
    damaged = content[:-10] if damage == "truncated" else content[:500] + b"??" + content[502:]
    system.pipe_file(f"/bucket/{name}", damaged)
    line = problem(make_config(remote, tmp_path))
    assert line.startswith(f"memory://bucket/{name} has {len(damaged)} bytes and sha256 ")
    assert name not in copies(tmp_path)
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_copy_is_fetched_again(demo, remote, tmp_path, damage, caplog):
    build(make_config(remote, tmp_path))
    (copy,) = tmp_path.rglob("books.bin")
    if damage == "truncated":
        os.truncate(copy, 100)
    elif damage == "missing":
        copy.unlink()
    else:
        copy.write_bytes(bytes(len(copy.read_bytes())))
    assert build(make_config(remote, tmp_path)).sample(0, 0)["source"] == "books"
    assert copy.read_bytes() == (demo / "books.bin").read_bytes()
    assert ("fetching it again" in caplog.text) == (damage != "missing")


def test_what_a_killed_process_left_is_removed(remote, tmp_path):
    build(make_config(remote, tmp_path))
    (copy,) = tmp_path.rglob("books.bin")
    left = copy.with_name("books.bin.tmp-deadbeef")
    left.write_bytes(b"half")
    build(make_config(remote, tmp_path))
    assert not left.exists()


def test_a_cache_directory_must_be_given(remote):
    assert problem(make_config(remote, None)) == (
        "memory://bucket/tokenizer/tokenizer.json is remote: set data.cache to a directory on a local disk with room "
        "for a copy"
    )


def test_missing_remote_files_are_named(remote, tmp_path):
    system = fsspec.filesystem("memory")
    system.rm("/bucket/books.json")
    assert problem(make_config(remote, tmp_path)) == (
        "memory://bucket/books.json does not exist (a source on a remote file system needs its manifest)"
    )


def test_a_file_system_that_fails_is_one_line(tmp_path):
    line = problem(make_config("nosuchprotocol://bucket", tmp_path))
    assert line.startswith("nosuchprotocol://bucket/tokenizer")
    assert "Protocol not known" in line


def test_without_fsspec_the_extra_is_named(remote, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert problem(make_config(remote, tmp_path)).endswith("needs the package fsspec: pip install 'hymba-train[data]'")


def test_a_full_disk_is_one_line_and_leaves_nothing(demo, remote, small_disk):
    config = make_config(remote, small_disk)
    config.tokenizer = str(demo / "tokenizer")
    line = problem(config)
    assert "cannot be written (No space left on device) while copying memory://bucket/books." in line
    assert "set data.cache to another disk" in line
    assert not list(small_disk.rglob("books.*"))


def test_processes_of_one_machine_fetch_once(demo, tmp_path):
    """Four processes at once: one copies, the others wait and find the copy."""
    code = (
        "import sys\n"
        "from hymba_train.data import storage\n"
        "copy = storage._copy\n"
        "def counting(url, *args):\n"
        "    print('copied', url.rsplit('/', 1)[-1], flush=True)\n"
        "    return copy(url, *args)\n"
        "storage._copy = counting\n"
        "print(storage.Cache(sys.argv[2]).source(sys.argv[1]))\n"
    )
    arguments = [sys.executable, "-c", code, f"file://{demo}/books", str(tmp_path)]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert sorted(line for lines in outputs for line in lines[:-1]) == ["copied books.bin", "copied books.idx"]
    assert len({lines[-1] for lines in outputs}) == 1


def test_a_packing_is_uploaded_beside_its_source_and_used_from_there(remote, tmp_path):
    from data_prep.pack import pack_phases
    from hymba_train.config.schema import Config

    config = Config(data=make_config(remote, tmp_path, packing="best_fit"))
    assert problem(config.data).startswith("memory://bucket/books.best_fit-64.pack does not exist: build it once")
    said: list[str] = []
    assert pack_phases(config, say=said.append) == ["memory://bucket/books.best_fit-64.pack"]
    assert build(config.data).phases[0].packs["books"].facts["packing"] == "best_fit"
    assert pack_phases(config, say=said.append) == []
    assert said[-1] == "memory://bucket/books.best_fit-64.pack is there already"


@pytest.mark.parametrize(
    ("base", "path", "joined"),
    [
        (None, "a/b", "a/b"), ("/data", "a", "/data/a"), ("/data", "/other/a", "/other/a"),
        ("s3://bucket/x", "a", "s3://bucket/x/a"), ("s3://bucket/", "a", "s3://bucket/a"),
        ("/data", "gs://b/a", "gs://b/a"), ("s3://bucket", "/local/a", "/local/a"),
    ],
)  # fmt: skip
def test_paths_and_urls_join(base, path, joined):
    assert storage.join(base, path) == joined


def test_plan_leaves_remote_files_to_the_job(remote):
    from hymba_train.config.schema import Config
    from hymba_train.plan.paths import check_files

    assert check_files(Config(data=make_config(remote, "/cache"))) == []


def test_manifest_and_files_travel_together(demo, tmp_path):
    """A source copied by hand, but with the manifest of another: found when it is opened."""
    shutil.copy(demo / "books.bin", tmp_path)
    shutil.copy(demo / "books.idx", tmp_path)
    manifest = json.loads((demo / "books.json").read_text())
    manifest["files"]["books.bin"]["spots"][3][1] = "0" * 16
    (tmp_path / "books.json").write_text(json.dumps(manifest))
    config = make_config(str(tmp_path), None)
    config.tokenizer = str(demo / "tokenizer")
    offset = manifest["files"]["books.bin"]["spots"][3][0]
    assert problem(config).startswith(
        f"{tmp_path}/books.bin differs from its manifest in the 65536 bytes from offset {offset}: "
    )
