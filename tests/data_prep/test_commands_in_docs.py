"""Every `hymba data` command on the page about data is one that the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from data_prep.cli import RUN
from data_prep.flags import parse

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
BLOCKS = "\n".join(re.findall(r"^```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [line.strip() for line in BLOCKS.replace("\\\n", " ").splitlines() if line.strip().startswith("hymba data ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command.replace("I/N", "0/8"), comments=True)[2:]
    assert parse(words).command in RUN


def test_every_subcommand_is_on_the_page():
    assert len(COMMANDS) > 10
    assert [name for name in RUN if name not in PAGE] == []
