"""A command that waits for what is piped into it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmbridge.cli.command_runner import Signals
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.prompt_input import whole_prompt
from lmbridge.cli.terminal import Terminal
from tests.cli.test_command_runner import status

WAITING = """
from lmbridge.cli.prompt_input import whole_prompt
from lmbridge.cli.command_runner import run
import typer

async def work(terminal, signals):
    terminal.line("waiting")
    await whole_prompt("Hi.")

try:
    run(work)
except typer.Exit as ending:
    raise SystemExit(ending.exit_code)
"""


def test_a_signal_ends_the_wait_for_a_pipe_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(_terminal: Terminal, _signals: Signals) -> ExitStatus:
        signal.raise_signal(signal.SIGTERM)
        await whole_prompt("Hi.")
        return ExitStatus.OK

    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert status(work) == 143


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected", "errors"), [(signal.SIGINT, 130, b"\ninterrupted\n"), (signal.SIGTERM, 143, b"")]
)
def test_the_process_ends_while_its_pipe_is_open(number: int, expected: int, errors: bytes, tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(number)
        # stdin stays open until the process has ended.
        assert process.wait(30) == expected
        assert process.stderr.read() == errors


@pytest.mark.slow
def test_ctrl_c_during_the_imports_is_not_a_traceback() -> None:
    code = (
        "import signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lmbridge.cli.application':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from lmbridge.__main__ import main\n"
        "main()\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (process.returncode, process.stderr) == (130, b"")
