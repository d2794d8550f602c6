"""The help, the version, completion, and starting without the extra."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer.main
from typer.testing import CliRunner

import lmbridge
from lmbridge.cli.application import app
from lmbridge.cli.help_examples import examples
from tests.cli.support import Command

HELP = Command()


def commands() -> Iterator[tuple[str, ...]]:
    """Yields the name of each command, with those of a group."""
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]  # the root is a group
        yield (name,)
        for child in getattr(command, "commands", {}):
            yield (name, child)


@pytest.mark.parametrize("name", [(), *commands()], ids=" ".join)
def test_the_help_of_every_command_has_examples_and_what_each_option_does(name: tuple[str, ...]) -> None:
    status, output, errors = HELP(*name, "--help")
    assert (status, errors) == (0, "")
    assert "\n  Examples:\n    " in output
    assert all(line in output for line in examples(" ".join(name)).splitlines()[2:])
    root = typer.main.get_command(app)
    command = root
    for part in name:
        command = command.commands[part]  # type: ignore[attr-defined]  # as above
    assert [each.name for each in command.params if not getattr(each, "help", None)] == []


@pytest.mark.parametrize("arguments", [["--version"], ["chat", "-h"]])
def test_the_version_and_the_short_help(arguments: list[str]) -> None:
    outcome = HELP(*arguments)
    assert outcome.status == 0
    assert outcome.output.startswith((f"lmbridge {lmbridge.__version__}\n", "Usage: lmbridge chat"))


def test_without_a_command_it_shows_the_help() -> None:
    status, output, errors = HELP()
    assert (status, output) == (2, "")
    assert errors.startswith("Usage: lmbridge")


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--nonsense"], "no such option: --nonsense", "lmbridge --help lists the commands and options"),
        (["nonsense"], "no such command 'nonsense'", "lmbridge --help lists the commands and options"),
        (["models", "nonsense"], "no such command 'nonsense'", "lmbridge models --help lists the commands and options"),
        (["models", "load"], "missing argument 'MODEL'", "lmbridge models load --help lists the options"),
        (["chat", "--max-tokens", "0"], "invalid value for '--max-tokens'", "lmbridge chat --help lists the options"),
        (["chat", "--model"], "option '--model' requires an argument", "lmbridge chat --help lists the options"),
        (["chat", "--\x1b[2J\n"], "no such option: --", "lmbridge chat --help lists the options"),
    ],
)
def test_wrong_arguments_are_one_line_and_a_hint(arguments: list[str], error: str, hint: str) -> None:
    status, output, errors = HELP(*arguments)
    first, second = errors.splitlines()
    assert (status, output, second) == (2, "", f"hint: {hint}")
    assert first.startswith(f"error: {error}")
    assert "\x1b" not in errors


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("complete_bash", {"COMP_WORDS": "lmbridge ch", "COMP_CWORD": "1"}),
        ("complete_zsh", {"_TYPER_COMPLETE_ARGS": "lmbridge ch"}),
        ("complete_fish", {"_TYPER_COMPLETE_ARGS": "lmbridge ch", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_shells_complete_commands(instruction: str, words: dict[str, str]) -> None:
    environment = {"_LMBRIDGE_COMPLETE": instruction, **words}
    assert "chat" in CliRunner().invoke(app, [], env=environment, prog_name="lmbridge").output


@pytest.mark.slow
def test_it_says_what_to_install_without_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from lmbridge.__main__ import main; main()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == "lmbridge: the command line needs typer: pip install 'lmbridge[cli]'\n"
