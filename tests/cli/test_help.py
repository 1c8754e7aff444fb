"""Help shows what it is given: nothing is taken for markup."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvbench.cli.app import app

COMMANDS: dict[str, Any] = dict(vars(typer.main.get_command(app))["commands"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_word_of_the_help_is_shown(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "160"}).output
    text = " ".join(re.sub("[│\x1b]", " ", shown).split())
    command = COMMANDS[name]
    given = [command.help, *(parameter.help for parameter in command.params if parameter.name != "help")]
    for words in given:
        plain = words.replace("[bold]", "").replace("[/]", "").replace("\\[", "[")
        assert " ".join(plain.split()) in text
