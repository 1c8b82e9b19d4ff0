"""The Dockerfile, read without Docker: its instructions parse, its files exist, its versions are those tested.

What its CPU stage runs has been run step by step in a fresh virtual environment; no image has been built here.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "HEALTHCHECK", "ENTRYPOINT", "CMD", "SHELL"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continuation lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for instruction, arguments in instructions():
        if instruction == "FROM":
            name = re.fullmatch(r"\S+ AS (\w+)", arguments)[1]
            found[name] = []
        found[name].append((instruction, arguments))
    return found


def test_only_known_instructions_and_two_stages():
    assert {instruction for instruction, _ in instructions()} <= KNOWN
    assert list(stages()) == ["", "cpu", "gpu"]  # the last one is what `docker build .` makes
    assert {arguments.split("=")[0] for i, arguments in stages()[""] if i == "ARG"} == {"BASE_IMAGE", "CPU_IMAGE"}


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_every_variable_is_declared_before_it_is_used(stage):
    declared = {"BASE_IMAGE", "CPU_IMAGE", "PATH"}
    for instruction, arguments in stages()[stage]:
        used = set(re.findall(r"\$\{(\w+)\}", arguments))
        assert used <= declared, f"{instruction} {arguments}"
        if instruction in ("ARG", "ENV"):
            declared |= {word.split("=")[0] for word in shlex.split(arguments)}


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_every_copied_file_exists_and_is_not_ignored(stage):
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    assert ignore[0] == "*"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {name for i, arguments in stages()[stage] if i == "COPY" for name in arguments.split()[:-1]}
    assert copied == allowed
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_all_that_setup_needs_is_copied():
    text = (ROOT / "setup.py").read_text()
    packages = set(re.findall(r'"(\w+)\*"', text)) | {"recipes"}
    assert packages == {"hymba_train", "data_prep", "launch", "recipes"}
    for stage in ("cpu", "gpu"):
        copied = " ".join(arguments for i, arguments in stages()[stage] if i == "COPY").split()
        assert packages | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_shell_commands_parse(stage):
    for instruction, arguments in stages()[stage]:
        if instruction == "RUN":
            done = subprocess.run(["bash", "-n"], input=arguments, capture_output=True, text=True)
            assert done.returncode == 0, arguments
        if instruction in ("CMD", "ENTRYPOINT"):
            assert json.loads(arguments)
        if instruction == "HEALTHCHECK":
            assert json.loads(arguments.partition(" CMD ")[2])


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_a_normal_user_runs_it(stage):
    order = [instruction for instruction, _ in stages()[stage]]
    (user,) = [arguments for i, arguments in stages()[stage] if i == "USER"]
    assert user not in ("root", "0")
    assert "RUN" not in order[order.index("USER") :] or stage == "cpu"


def test_the_versions_are_those_of_the_makefile():
    makefile = dict(re.findall(r"^(\w+_VERSION) \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for stage in ("cpu", "gpu"):
        pinned = dict(a.split("=", 1) for i, a in stages()[stage] if i == "ARG" and "_VERSION=" in a)
        assert pinned["MEGATRON_VERSION"] == makefile["MEGATRON_VERSION"]
        assert pinned.get("TORCH_VERSION", makefile["TORCH_VERSION"]) == makefile["TORCH_VERSION"]


def test_everything_is_pinned():
    for stage in ("cpu", "gpu"):
        for instruction, arguments in stages()[stage]:
            if instruction == "RUN" and "pip install" in arguments and "/src" not in arguments:
                assert "==${" in arguments, arguments
            if instruction == "RUN" and "/src[" in arguments:
                assert "-c " in arguments, arguments
