"""docs/cli.md: its outputs are there, its help is up to date, and it knows every command and exit status."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from lmbridge.cli.application import app
from lmbridge.cli.exit_status import ExitStatus
from tests.cli.support import Command

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"```shell\n((?:(?!```).)*)```\n\n```text\n((?:(?!```).)*)```", PAGE, re.DOTALL)


def test_every_output_was_generated() -> None:
    assert len(BLOCKS) >= 8
    assert [command for command, output in BLOCKS if not output.strip()] == []


@pytest.mark.parametrize(("command", "output"), [each for each in BLOCKS if each[0].strip().endswith("--help")])
def test_the_help_on_the_page_is_that_of_the_command(
    monkeypatch: pytest.MonkeyPatch, command: str, output: str
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    name, *arguments = shlex.split(command)
    assert name == "lmbridge"
    shown = Command()(*arguments).output
    assert " ".join(shown.split()) == " ".join(output.split())


def test_every_command_is_described() -> None:
    names = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # the root is a group
    assert [name for name in names if f"lmbridge {name}" not in PAGE] == []


def test_the_table_of_exit_statuses_is_complete() -> None:
    listed = [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)]
    assert listed == [status.value for status in ExitStatus]
