"""Where recipes are found, and which options each of their groups has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import hymba_train
from hymba_train.errors import UserError


def recipes_directory() -> Path:
    """Directory of the recipes that come with this package.

    In a checkout it lies beside the package; a wheel installs it as the package ``hymba_train_recipes``.
    Raises UserError where neither is there.
    """
    checkout = Path(hymba_train.__file__).resolve().parent.parent / "recipes"
    if (checkout / "config.yaml").is_file():
        return checkout
    spec = importlib.util.find_spec("hymba_train_recipes")
    for place in (spec.submodule_search_locations or ()) if spec else ():  # a package of data, without code
        if (Path(place) / "config.yaml").is_file():
            return Path(place)
    raise UserError(
        f"recipes: neither {checkout} nor the package hymba_train_recipes is there; reinstall hymba_train, "
        "or work in a checkout"
    )


NOT_OF_A_RUN = ("cluster",)
"""Folders beside the groups that configure something else: `hymba launch` reads cluster/."""


def group_options(*directories: Path) -> dict[str, list[str]]:
    """Group -> names of its options, over all directories: ``{"model": ["hymba_125m", ...], ...}``."""
    groups: dict[str, set[str]] = {}
    for directory in directories:
        for file in directory.glob("*/**/*.yaml"):
            group, _, option = file.relative_to(directory).with_suffix("").as_posix().partition("/")
            if group not in NOT_OF_A_RUN:
                groups.setdefault(group, set()).add(option)
    return {group: sorted(options) for group, options in sorted(groups.items())}


def check_user_directory(user: Path, recipes: Path) -> None:
    """Refuse a --config-dir that does not exist, or that hides a recipe behind one of the same name.

    Raises UserError.
    """
    if not user.is_dir():
        raise UserError(f"--config-dir {user}: no such directory")
    own = {f.relative_to(user) for f in user.rglob("*.yaml")}
    twice = sorted(str(f) for f in own if (recipes / f).is_file())
    if twice:
        raise UserError(*(f"--config-dir {user}: {f} is a recipe of the package too; rename yours" for f in twice))
