"""The resolved configuration of a run on disk: one YAML file in the run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hymba_train
from hymba_train.config.schema import Config, DataConfig
from hymba_train.config.typed import flatten, from_plain, to_plain
from hymba_train.errors import UserError
from hymba_train.files import make_private, write_atomically

FROZEN_NAME = "resolved.yaml"


def run_directory(config: Config) -> Path:
    """run.directory/run.name: a function of the configuration alone, so every rank and every restart finds it."""
    return Path(config.run.directory) / config.run.name


def data_file(data: DataConfig, path: str) -> Path:
    """A path of the data section (tokenizer, sources.*.path), which starts from data.path unless it is absolute."""
    return Path(data.path or ".") / path


def to_yaml(config: Config) -> str:
    """The configuration as YAML, keys in the order of the schema, with a comment that says what wrote it."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """A key a line; lists in one line. No anchors, should two keys hold one object."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_representer(list, lambda d, value: d.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True))
    body = yaml.dump(to_plain(config), Dumper=Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)
    origin = f"hymba_train {hymba_train.__version__}"
    return f"# Resolved configuration of a run, written by {origin}. Start it again with --frozen.\n{body}"


def freeze(config: Config, path: str | Path) -> Path:
    """Write the configuration to ``path``: complete or not at all (temporary file, fsync, rename). Raises UserError."""
    path = Path(path)
    try:
        make_private(path.parent)
        write_atomically(path, to_yaml(config))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another run.directory") from error
    return path


def freeze_run(config: Config) -> tuple[Path, list[str]]:
    """Freeze into the run directory. Returns the file, and one line for each key that an earlier start had otherwise.

    A directory whose earlier configuration describes another *model* belongs to another run: UserError. Any other
    change (a longer phase, other logging) is the user's right; the earlier file is kept as resolved.N.yaml.
    """
    path = run_directory(config) / FROZEN_NAME
    if not path.is_file():
        return freeze(config, path), []
    changes = changed_keys(load_frozen(path), config)
    if not changes:
        return path, []
    model = [line for line in changes if line.startswith("model.")]
    if model:
        raise UserError(
            *(f"{line}: {path.parent} holds a run of another model; choose another run.name" for line in model)
        )
    number = 1
    while (kept := path.with_name(f"resolved.{number}.yaml")).exists():
        number += 1
    os.link(path, kept)  # never a moment without resolved.yaml
    return freeze(config, path), changes


def changed_keys(before: Config, after: Config) -> list[str]:
    """One line for every key that differs: ``optim.lr: 0.003 -> 0.001``."""
    old, new = flatten(to_plain(before)), flatten(to_plain(after))
    keys = [*old, *(k for k in new if k not in old)]
    lines = []
    for key in keys:
        a: Any = old.get(key, "(not there)")
        b: Any = new.get(key, "(not there)")
        if a != b:
            lines.append(f"{key}: {a} -> {b}")
    return lines


def load_frozen(path: str | Path) -> Config:
    """Read a file that :func:`freeze` wrote, as strictly as a composed configuration.

    Raises UserError when it is missing, is not plain YAML, or does not fit the schema.
    """
    import yaml

    path = Path(path)

    class Loader(yaml.SafeLoader):
        """Without links, which a few lines can multiply to more than memory holds. A frozen file has none."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"links ('*{self.peek_event().anchor}') are not taken")
            return super().compose_node(parent, index)

    try:
        plain = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a run writes its {FROZEN_NAME} into run.directory/run.name") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # too deep; a date that is none
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path}: holds no configuration; {FROZEN_NAME} of a run directory is expected")
    try:
        return from_plain(plain)
    except UserError as error:
        raise UserError(*(f"{path}: {line}" for line in error.problems)) from error
