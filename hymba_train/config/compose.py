"""Composition: recipes/ and the overrides of the command line become one typed configuration.

Hydra does the composing (its compose API); what it composes is then checked strictly against the schema, so a key
that a recipe does not mention can be set without ``+``, and a key that the schema does not know is refused wherever
it comes from. Nothing in a configuration is ever instantiated or run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hymba_train.config.blends import name_blends
from hymba_train.config.nearest import did_you_mean
from hymba_train.config.recipes import check_user_directory, group_options, recipes_directory
from hymba_train.config.schema import Config, Plain
from hymba_train.config.secrets import secrets_from_environment
from hymba_train.config.typed import field_types, from_plain, schema_keys, to_plain
from hymba_train.errors import UserError


def compose(
    overrides: Sequence[str] = (), recipes_dir: str | Path | None = None, config_dir: str | Path | None = None
) -> Config:
    """One typed configuration.

    overrides: as on the command line: ``experiment=demo``, ``model=hymba_125m``, ``optim.lr=1e-3``,
        ``data.phases.stable.micro_batch_size=8``, ``~data.phases.long`` (leave a phase out).
    recipes_dir: directory with config.yaml and the groups; None: the package's own (:func:`recipes_directory`).
    config_dir: further directory with options of the same groups, a user's own experiments for instance.

    Raises UserError, one line a problem, for anything the user can mend.
    """
    recipes = Path(recipes_dir) if recipes_dir is not None else recipes_directory()
    directories = [recipes.resolve()]
    if config_dir is not None:
        check_user_directory(Path(config_dir), recipes)
        directories.append(Path(config_dir).resolve())
    prepared = _prepare(overrides, group_options(*directories))
    return from_plain(name_blends(_hydra_compose(directories, prepared)))


def _prepare(overrides: Sequence[str], groups: dict[str, list[str]]) -> list[str]:
    """Overrides as Hydra gets them: groups as they are, values with ``++``: the schema decides what is known."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    prepared: list[str] = []
    problems: list[str] = []
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
            value = None if parsed.is_delete() or parsed.is_sweep_override() else parsed.value()
        except HydraException:
            problems.append(_unreadable(text))
            continue
        key = parsed.key_or_group
        if not key:
            problems.append(_unreadable(text))
        elif key.partition(".")[0] == "cluster":
            problems.append(f"{text!r}: clusters belong to hymba launch slurm; leave it out here")
        elif parsed.is_sweep_override():
            problems.append(f"{text!r}: several values for one key; choose one, or write a list as {key}=[a,b]")
        elif parsed.package is not None or key.partition(".")[0] == "hydra":
            problems.append(f"{text!r}: Hydra's own settings and packages have no effect here; leave it out")
        elif key in groups and parsed.is_delete():
            problems.append(f"{text!r}: a group cannot be left out; choose one of {', '.join(groups[key])}")
        elif key in groups and not isinstance(value, dict):
            problems += _check_option(key, value, groups)
            prepared.append(text.lstrip("+"))
        elif "." not in key and key not in field_types(Config):
            tail = did_you_mean(key, [*groups, *schema_keys()], "groups are")
            tail = tail if tail.startswith("did") else f"groups are: {', '.join(groups)}"
            problems.append(f"{key}: no such group or key; {tail}")
        else:
            prepared.append(text if parsed.is_delete() else "++" + text.lstrip("+"))
    if problems:
        raise UserError(*problems)
    return prepared


def _check_option(group: str, value: Any, groups: dict[str, list[str]]) -> list[str]:
    if value is None and group == "experiment":
        return []
    if isinstance(value, str) and value in groups[group]:
        return []
    return [f"{group}={'null' if value is None else value}: no such {group}; {did_you_mean(str(value), groups[group])}"]


def _unreadable(text: str) -> str:
    if "=" not in text and not text.startswith("~"):
        return f"{text!r}: not an override; write KEY=VALUE, e.g. experiment=demo or optim.lr=1e-3"
    key, _, value = text.partition("=")
    if not key:
        return f"{text!r}: no key in front of '='; write KEY=VALUE, e.g. experiment=demo or optim.lr=1e-3"
    value = value.strip("'\"")
    return f"{text!r}: cannot be read; quote the value twice if it holds special characters: {key}='\"{value}\"'"


def _hydra_compose(directories: list[Path], overrides: list[str]) -> Plain:
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    quoted = ["'file://" + str(d).replace("'", "\\'") + "'" for d in directories[1:]]
    search = [f"hydra.searchpath=[{','.join(quoted)}]"] if quoted else []
    try:
        with initialize_config_dir(config_dir=str(directories[0]), version_base="1.3"):
            composed = hydra_compose(config_name="config", overrides=overrides + search)
        # Defaults go underneath so that an interpolation may name a key that no recipe sets.
        plain = OmegaConf.to_container(composed, resolve=False, throw_on_missing=False)
        if secrets := secrets_from_environment(plain):
            raise UserError(*secrets)
        merged = OmegaConf.create(_fill_in(plain, to_plain(Config())))
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=False)
        assert isinstance(plain, dict)
        return cast(Plain, plain)  # from_plain refuses keys that are no text
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, directories)) from error
    except yaml.YAMLError as error:
        raise UserError("recipe is not plain YAML: " + " ".join(str(error).split())) from error


def _named_in(group: str, option: str, directories: list[Path]) -> str:
    """'experiment/mine.yaml: ' for the recipe whose defaults ask for an option."""
    asks = re.compile(rf"^\s*-.*\b{re.escape(group)}\s*:\s*{re.escape(option)}\s*(#.*)?$", re.MULTILINE)
    for directory in directories:
        for file in sorted(directory.rglob("*.yaml")):
            if asks.search(file.read_text(encoding="utf-8")):
                return f"{file.relative_to(directory)}: "
    return ""


def _fill_in(plain: Any, defaults: Any) -> Any:
    """``plain`` with the keys that only ``defaults`` has. OmegaConf.merge would let a default hide a "???"."""
    if not (isinstance(plain, dict) and isinstance(defaults, dict)):
        return plain
    filled = {key: _fill_in(plain[key], value) if key in plain else value for key, value in defaults.items()}
    return filled | {key: value for key, value in plain.items() if key not in defaults}


def _explain(error: Exception, directories: list[Path]) -> str:
    """One line for an error of Hydra or OmegaConf that the checks before it could not foresee."""
    groups = group_options(*directories)
    missing = getattr(error, "missing_cfg_file", None)
    if isinstance(missing, str):
        group, _, option = missing.partition("/")
        tail = did_you_mean(option, groups[group]) if group in groups else did_you_mean(group, groups, "groups are")
        return f"{_named_in(group, option, directories)}{group}={option}: no such {group}; {tail}"
    text = " ".join(str(error).split("\n    full_key:")[0].split())
    unknown = re.match(r"Interpolation key '([^']+)' not found", text)
    if unknown:
        text = f"${{{unknown[1]}}} names no key; {did_you_mean(unknown[1], schema_keys())}"
    if text.startswith("Unsupported interpolation type"):
        text += "; ${...} takes another key, or oc.env:VARIABLE"
    if full_key := getattr(error, "full_key", None):
        return f"{full_key}: {text}"
    mandatory = re.match(r"You must specify '([^']+)'", text)
    if mandatory:
        group = mandatory[1]
        return f"{group}: not chosen; give experiment=... or {group}=... ({', '.join(groups.get(group, []))})"
    delete = re.match(r"Could not delete from config\. '([^']+)' does not exist", text)
    if delete:
        return f"~{delete[1]}: nothing to leave out, there is no such key"
    return text
