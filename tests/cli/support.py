"""Running a command in this process, without a terminal."""

from __future__ import annotations

from typing import NamedTuple

from typer.testing import CliRunner

from lmbridge.cli.application import app


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    """What it wrote to stdout."""
    errors: str
    """What it wrote to stderr."""


class Command:
    """Runs `lmbridge` with arguments. Its stdin, stdout and stderr are pipes."""

    def __call__(self, *arguments: str, stdin: str | bytes = "") -> Outcome:
        result = CliRunner().invoke(app, list(arguments), input=stdin, prog_name="lmbridge")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)
