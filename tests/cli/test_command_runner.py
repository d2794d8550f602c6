"""How a command ends: signals, errors in one line, the exit status, and closed pipes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lmbridge import (
    LLMAuthenticationError,
    LLMConnectionError,
    LLMError,
    LLMTimeoutError,
    LLMValidationError,
    MaxRoundsExceededError,
    ModelNotFoundError,
)
from lmbridge.cli.command_runner import CommandError, Signals, UsageError, Work, run
from lmbridge.cli.exit_status import ExitStatus, exit_status_of
from lmbridge.cli.terminal import Terminal


def status(work: Work, *, debug: bool = False) -> int:
    with pytest.raises(typer.Exit) as caught:
        run(work, debug=debug)
    return caught.value.exit_code


def raising(error: BaseException) -> Work:
    async def work(_terminal: Terminal, _signals: Signals) -> ExitStatus:
        raise error

    return work


def test_the_status_of_a_command_is_what_it_returns() -> None:
    async def work(_terminal: Terminal, _signals: Signals) -> ExitStatus:
        return ExitStatus.LENGTH

    assert status(work) == 10


@pytest.mark.parametrize(
    ("error", "expected", "written"),
    [
        (UsageError("no prompt", "give one"), 2, "error: no prompt\nhint: give one\n"),
        (CommandError("no server", status=ExitStatus.NO_SERVER), 3, "error: no server\n"),
        (LLMError("broken", hint="mend it"), 1, "error: broken\nhint: mend it\n"),
        (LLMError("broken \x1b[2J"), 1, "error: broken ␛[2J\n"),
        (ImportError("needs x: pip install 'lmbridge[local]'"), 1, "error: needs x: pip install 'lmbridge[local]'\n"),
        (RuntimeError("a bug"), 1, "error: unexpected RuntimeError: a bug\nhint: run it again with --debug for the"),
    ],
)
def test_an_error_is_one_line_and_a_hint(
    error: Exception, expected: int, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(raising(error)) == expected
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(written)
    assert "Traceback" not in errors


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    status(raising(LLMError("broken")), debug=True)
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback (most recent call last)")
    assert errors.endswith("error: broken\n")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LLMConnectionError(), ExitStatus.NO_SERVER),
        (LLMAuthenticationError(), ExitStatus.NO_SERVER),
        (LLMTimeoutError(), ExitStatus.TIMEOUT),
        (LLMValidationError("no such option"), ExitStatus.USAGE),
        (LLMValidationError("not what was asked for", status=200), ExitStatus.FAILED),
        (ModelNotFoundError("x"), ExitStatus.FAILED),
        (MaxRoundsExceededError(), ExitStatus.MAX_ROUNDS),
        (LLMError(), ExitStatus.FAILED),
    ],
)
def test_errors_have_statuses(error: LLMError, expected: ExitStatus) -> None:
    assert exit_status_of(error) is expected


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_the_command_and_its_clean_up_is_awaited(number: int, expected: int) -> None:
    steps: list[str] = []

    async def work(_terminal: Terminal, _signals: Signals) -> ExitStatus:
        signal.raise_signal(number)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")
        return ExitStatus.OK

    before = signal.getsignal(number)
    assert status(work) == expected
    assert steps == ["cleaned up"]
    assert signal.getsignal(number) is before


def test_ctrl_c_cancels_a_part_of_the_command_if_there_is_one_and_then_the_command() -> None:
    async def work(_terminal: Terminal, signals: Signals) -> ExitStatus:
        part = asyncio.create_task(asyncio.sleep(60))
        with signals.interrupting(part):
            signal.raise_signal(signal.SIGINT)
            await asyncio.wait({part})
        assert part.cancelled()
        assert signals.status is None
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)
        return ExitStatus.OK

    assert status(work) == 130


def test_sigterm_cancels_the_whole_command_even_during_a_part() -> None:
    async def work(_terminal: Terminal, signals: Signals) -> ExitStatus:
        part = asyncio.create_task(asyncio.sleep(60))
        try:
            with signals.interrupting(part):
                signal.raise_signal(signal.SIGTERM)
                await part
        finally:
            part.cancel()
        return ExitStatus.OK

    assert status(work) == 143


def test_warnings_of_the_library_are_shown_without_control_characters_and_logging_is_restored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("lmbridge")
    before = list(logger.handlers), logger.propagate, logger.level

    async def work(_terminal: Terminal, _signals: Signals) -> ExitStatus:
        logging.getLogger("lmbridge.client").info("not shown")
        logging.getLogger("lmbridge.client").warning("model %r answered", "x\x1b[2J")
        logging.getLogger("lmbridge.client").warning("it said \x1b[2J")
        return ExitStatus.OK

    status(work)
    assert capsys.readouterr().err == "model 'x\\x1b[2J' answered\nit said ␛[2J\n"
    assert (list(logger.handlers), logger.propagate, logger.level) == before


@pytest.mark.slow
def test_a_reader_that_has_left_ends_the_command_quietly(tmp_path: Path) -> None:
    code = (
        "from lmbridge.cli.command_runner import run\n"
        "async def work(terminal, signals):\n"
        "    while True:\n"
        "        terminal.write('x' * 10_000)\n"
        "import typer\n"
        "try:\n"
        "    run(work)\n"
        "except typer.Exit as ending:\n"
        "    raise SystemExit(ending.exit_code)\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (141, b"")
