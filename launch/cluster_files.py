"""Reading a cluster: ``cluster=NAME`` from recipes/cluster/, and ``cluster.KEY=VALUE`` on top."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hymba_train.config import TO_BE_GIVEN, from_plain, recipes_directory
from hymba_train.config.nearest import did_you_mean
from hymba_train.config.typed import field_types, flatten, schema_keys, to_plain
from hymba_train.errors import UserError
from launch.cluster import ClusterConfig, ClusterFile
from launch.cluster_checks import check_cluster

GROUP = "cluster"


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those of the cluster, those of the run)."""
    own = [o for o in overrides if o.startswith((f"{GROUP}=", f"{GROUP}."))]
    return own, [o for o in overrides if o not in own]


def load_cluster(overrides: Sequence[str], config_dir: str | Path | None = None) -> tuple[str, ClusterConfig]:
    """(name, cluster) from ``cluster=NAME`` or ``cluster=FILE.yaml``, and ``cluster.KEY=VALUE``.

    ``config_dir`` is a user's own directory, whose cluster/ is searched as well.

    Raises UserError with one line for every unknown key, wrong type and impossible value.
    """
    choices = [o.partition("=")[2] for o in overrides if o.startswith(f"{GROUP}=")]
    if len(choices) != 1:
        names = ", ".join(cluster_options(config_dir))
        raise UserError(f"cluster: {'given twice' if choices else 'not chosen'}; give one cluster=NAME ({names})")
    path = find_cluster(choices[0], config_dir)
    plain = _read(path)
    problems = _time_as_number(path, plain)
    for override in overrides:
        if not override.startswith(f"{GROUP}="):
            problems += _set(plain, override)
    if problems:
        raise UserError(*problems)
    cluster = from_plain({GROUP: plain}, ClusterFile).cluster
    missing = [key for key, value in flatten(to_plain(cluster)).items() if value == TO_BE_GIVEN]
    problems = [f"{GROUP}.{key}: to be given; write it into {path}, or add {GROUP}.{key}=..." for key in missing]
    problems = problems or check_cluster(cluster)
    if problems:
        raise UserError(*problems)
    return path.stem, cluster


def cluster_options(config_dir: str | Path | None = None) -> list[str]:
    """Names of all cluster files."""
    return sorted({file.stem for directory in _directories(config_dir) for file in directory.glob("*.yaml")})


def find_cluster(choice: str, config_dir: str | Path | None = None) -> Path:
    """File of a name, or the file itself. Raises UserError."""
    if choice.endswith((".yaml", ".yml")):
        if not Path(choice).is_file():
            raise UserError(f"cluster={choice}: no such file")
        return Path(choice)
    for directory in _directories(config_dir):
        if (path := directory / f"{choice}.yaml").is_file():
            return path
    raise UserError(f"cluster={choice}: no such cluster; {did_you_mean(choice, cluster_options(config_dir))}")


def _directories(config_dir: str | Path | None) -> list[Path]:
    own = [Path(config_dir) / GROUP] if config_dir is not None else []
    return [*own, recipes_directory() / GROUP]


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path}: holds no cluster; recipes/cluster/template.yaml shows one")
    return plain


def _time_as_number(path: Path, plain: dict[str, Any]) -> list[str]:
    """YAML reads a bare 04:00:00 as a number to base 60."""
    if isinstance(plain.get("time_limit"), int):
        return [f'{path}: cluster.time_limit: YAML takes this for a number; quote it: "04:00:00"']
    return []


def _set(plain: dict[str, Any], override: str) -> list[str]:
    """Put ``cluster.a.b=value`` into ``plain``; returns problems."""
    key, equals, text = override.partition("=")
    if not equals:
        return [f"{override!r}: not an override; write {GROUP}.KEY=VALUE, e.g. {GROUP}.time_limit=04:00:00"]
    *groups, last = key.split(".")[1:]
    node = plain
    for group in groups:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            return [f"{key}: {group} holds no keys; {did_you_mean(key, schema_keys(ClusterFile))}"]
    if _is_text(key):  # 04:00:00 and 0 are text there
        node[last] = None if text == "null" else text
        return []
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        return [f"{override!r}: cannot be read; the value is not YAML"]
    return []


def _is_text(dotted: str) -> bool:
    """Whether a key holds text by its type."""
    annotation: Any = ClusterFile
    for part in dotted.split("."):
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
            continue
        annotation = field_types(annotation).get(part) if isinstance(annotation, type) else None
        if annotation is None:
            return False
    return annotation in (str, str | None)
