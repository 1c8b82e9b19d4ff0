"""Files that a configuration names: those that are set must be there."""

from __future__ import annotations

from pathlib import Path

from hymba_train.config.choices import CHOICES
from hymba_train.config.freeze import data_file
from hymba_train.config.schema import TO_BE_GIVEN, Config


def check_files(config: Config) -> list[str]:
    """One line for every file that is named and missing."""
    data = config.data
    problems = []
    if data.path == TO_BE_GIVEN:  # nothing relative to it can be looked for
        return _check_load(config)
    remote = data.path is not None and is_url(data.path)
    if data.path is not None and not remote and not Path(data.path).is_dir():
        made_by = f"make it (the demo's: `hymba data prepare-demo --output {data.path}`), or set data.path"
        return [f"data.path={data.path}: no such directory; {made_by}", *_check_load(config)]
    if data.tokenizer != TO_BE_GIVEN and not remote and not is_url(data.tokenizer):
        path = data_file(data, data.tokenizer)
        if tokenizer_file(path) is None:
            problems.append(
                f"data.tokenizer={data.tokenizer}: {path} is neither a directory with tokenizer.json nor a .model file"
            )
    for name, source in data.sources.items():
        if source.path == TO_BE_GIVEN or remote or is_url(source.path):
            continue
        prefix = data_file(data, source.path)
        missing = [suffix for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
        if missing:
            files = " and ".join(f"{prefix}{suffix}" for suffix in missing)
            problems.append(f"data.sources.{name}.path={source.path}: no {files}; `hymba data tokenize` writes them")
        problems += _check_packs(config, name, prefix)
    return problems + _check_load(config)


def check_cache(config: Config) -> list[str]:
    """A cache for what is fetched from URLs; to be checked away from the machine with the data, too."""
    data = config.data
    named = {"data.path": data.path, "data.tokenizer": data.tokenizer}
    named |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    remote = [f"{key}={path}" for key, path in named.items() if path is not None and is_url(path)]
    if not remote or data.cache is not None:
        return []
    return [f"data.cache: to be given, because {remote[0]} is remote: a directory on a local disk with room for a copy"]


def is_url(path: str) -> bool:
    """A remote file system: what lies there is looked for when the data are opened."""
    return "://" in path


def tokenizer_file(path: Path) -> Path | None:
    """The file that holds a tokenizer: ``path``, or one in this directory. None: there is none."""
    return next((p for p in (path, path / "tokenizer.json", path / "tokenizer.model") if p.is_file()), None)


def _check_packs(config: Config, source: str, prefix: Path) -> list[str]:
    """Packings of a source that phases ask for and that have not been made: a job never makes them."""
    problems = []
    for name, phase in config.data.phases.items():
        if phase.packing not in CHOICES["data.phases.NAME.packing"]:
            continue  # said elsewhere
        if phase.seq_length == TO_BE_GIVEN or phase.pack_suffix is None or not phase.blend.get(source):
            continue
        path = Path(f"{prefix}{phase.pack_suffix}")
        if not path.is_file():
            problems.append(
                f"data.phases.{name}.packing={phase.packing}: no {path}; make it once, offline: `hymba data pack` with "
                "the overrides of this run"
            )
    return problems


def _check_load(config: Config) -> list[str]:
    load = config.checkpoint.load
    if load is None or load == TO_BE_GIVEN or Path(load).is_dir():
        return []
    return [f"checkpoint.load={load}: no such directory; give a run or step directory, or null"]
