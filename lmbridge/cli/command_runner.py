"""Runs the coroutine of a command: signals, errors in one line, and the exit status.

Ctrl-C cancels the task of the command, so that everything is cleaned up as after any cancellation: the stream is
closed, and the server stops generating. A command that goes on after Ctrl-C, such as `chat`, registers the task that is
cancelled instead of the whole command; see `Signals.interrupting`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn

import typer

from lmbridge._printable import SafeFormatter
from lmbridge.cli.exit_status import ExitStatus, exit_status_of
from lmbridge.cli.terminal import Terminal
from lmbridge.errors import LLMError, MCPError

Work = Callable[["Terminal", "Signals"], Coroutine[Any, Any, ExitStatus]]
"""The coroutine function of a command, which returns the exit status."""

_MCP_HINT: Final = "lmbridge doctor starts the servers of the configuration one by one, and says what to do"
_REPORT_HINT: Final = "run it again with --debug for the traceback"


class UsageError(Exception):
    """The arguments of a command are not valid, or make no sense together.

    Args:
        message: What is wrong.
        hint: What to do instead.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CommandError(Exception):
    """A command cannot go on.

    Args:
        message: What is wrong.
        hint: What to do.
        status: The exit status.
    """

    def __init__(self, message: str, hint: str | None = None, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


class Signals:
    """Handles SIGINT and SIGTERM while a command runs.

    The first SIGINT cancels the task that was registered with `interrupting`, or else the command. Once the command is
    being cancelled, another SIGINT cancels it again, and a third one ends the process at once.
    """

    def __init__(self, command: asyncio.Task[Any]) -> None:
        self._command = command
        self._loop = command.get_loop()
        self._interruptible: asyncio.Task[Any] | None = None
        self._interrupts = 0
        self.status: ExitStatus | None = None
        """The exit status after a signal that ends the command, or None if there was none."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals until the block ends, and restores the handlers that there were before."""
        # loop.add_signal_handler would be simpler, but it does not exist on Windows.
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in before:
                signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """Lets the next SIGINT cancel a task instead of the whole command, until the block ends."""
        self._interruptible = task
        try:
            yield
        finally:
            self._interruptible = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.status is not None:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(ExitStatus.INTERRUPTED)
        self._loop.call_soon_threadsafe(self._cancel, number)

    def _cancel(self, number: int) -> None:
        task, self._interruptible = self._interruptible, None
        if number == signal.SIGINT and task is not None and not task.done():
            task.cancel()
            return
        self.status = ExitStatus.INTERRUPTED if number == signal.SIGINT else ExitStatus.TERMINATED
        self._command.cancel()


def run(work: Work, *, debug: bool = False) -> NoReturn:
    """Runs a command to its end.

    Raises:
        typer.Exit: Always, with the exit status. What went wrong is on stderr.
    """
    terminal = Terminal()
    try:
        with _logging_to_stderr(debug=debug):
            status = asyncio.run(_run(work, terminal))
    except UsageError as error:
        status = ExitStatus.USAGE
        _report(terminal, error, str(error), error.hint, debug=debug)
    except CommandError as error:
        status = error.status
        _report(terminal, error, str(error), error.hint, debug=debug)
    except LLMError as error:
        status = exit_status_of(error)
        _report(terminal, error, *split_hint(error), debug=debug)
    except BrokenPipeError:
        status = ExitStatus.BROKEN_PIPE
        # The interpreter flushes stdout at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ImportError, OSError) as error:
        status = ExitStatus.FAILED
        _report(terminal, error, str(error), None, debug=debug)
    except Exception as error:  # noqa: BLE001 - a user of a command must not see a traceback that was not asked for
        status = ExitStatus.FAILED
        hint = None if debug else _REPORT_HINT
        _report(terminal, error, f"unexpected {type(error).__name__}: {error}", hint, debug=debug)
    raise typer.Exit(status)


async def _run(work: Work, terminal: Terminal) -> ExitStatus:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("the coroutine of a command must run in a task")
    signals = Signals(task)
    with signals.installed():
        try:
            return await work(terminal, signals)
        except asyncio.CancelledError:
            if signals.status is None:
                raise
            if signals.status is ExitStatus.INTERRUPTED:
                terminal.notice("\ninterrupted")
            return signals.status


def _report(terminal: Terminal, error: BaseException, text: str, hint: str | None, *, debug: bool) -> None:
    if debug:
        terminal.notice("".join(traceback.format_exception(error)))
    terminal.problem(text, hint)


def split_hint(error: LLMError) -> tuple[str, str | None]:
    """Returns the text of an error without its hint, and the hint. For an error of MCP, there always is a hint."""
    text = str(error)
    if error.hint and text.endswith(error.hint):
        return text[: -len(error.hint)].rstrip("; \n"), error.hint
    return text, error.hint or (_MCP_HINT if isinstance(error, MCPError) else None)


@contextmanager
def _logging_to_stderr(*, debug: bool) -> Iterator[None]:
    """Writes the log of lmbridge to stderr until the block ends: warnings, or everything."""
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s" if debug else "%(message)s"))
    library = logging.getLogger("lmbridge")
    before = library.handlers, library.propagate, library.level
    library.handlers, library.propagate = [handler], False
    library.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        library.handlers, library.propagate = before[:2]
        library.setLevel(before[2])
