"""The prompt of a command: its argument, and what is piped into it."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import Future

from lmbridge.cli.command_runner import UsageError


async def whole_prompt(prompt: str | None) -> str | None:
    """Returns the prompt, followed by what is piped into the command; None if neither was given.

    Raises:
        UsageError: The prompt is empty, or what is piped in is not text.
    """
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _decode_prompt(await _read_stdin())
    text = "\n\n".join(each for each in (prompt or "", piped.rstrip("\n")) if each.strip())
    if text:
        return text
    if prompt is not None:
        raise UsageError("the prompt is empty")
    return None


def has_terminal() -> bool:
    """Returns whether a person can type at stdin and read stdout."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


async def _read_stdin() -> bytes:
    """Returns all that is piped into the command.

    The thread that reads is a daemon, because otherwise a signal could not end the command before the pipe ends. It
    reads from the raw file, because a daemon thread that holds the lock of the buffer when the interpreter exits makes
    the interpreter abort.
    """
    file = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    whole: Future[bytes] = Future()
    # From now on the future cannot be cancelled, so the thread can set it even if no task waits for it any more.
    whole.set_running_or_notify_cancel()

    def read() -> None:
        try:
            data = file.read()
        except BaseException as error:  # noqa: BLE001 - raised by the coroutine that waits
            whole.set_exception(error)
        else:
            whole.set_result(data)

    threading.Thread(target=read, name="lmbridge-stdin", daemon=True).start()
    return await asyncio.wrap_future(whole)


def _decode_prompt(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"what is piped in is not text: {exc}", "show images with --image FILE") from exc
