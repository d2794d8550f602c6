"""What the programs that run in the foreground have in common: their log on stderr, and how they end.

They are `lmbridge-mcp`, `python -m lmbridge.gateway` and `python -m lmbridge.local`, which do not need the extra `cli`.
The command `lmbridge` has more exit statuses, and shows a hint on a separate line; see `cli/command_runner.py`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Coroutine
from typing import Any

from lmbridge._checks import is_usage_error
from lmbridge._printable import SafeFormatter, one_line, printable
from lmbridge.errors import LLMError


def log_to_stderr(log_format: str, *, level: int = logging.WARNING, debug: bool = False) -> None:
    """Writes the log to stderr, without control characters.

    Args:
        log_format: The format of a line.
        level: The lowest level that is written.
        debug: Whether everything that lmbridge logs is written.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter(log_format))
    logging.basicConfig(level=level, handlers=[handler])
    if debug:
        logging.getLogger("lmbridge").setLevel(logging.DEBUG)


def run_program(name: str, work: Coroutine[Any, Any, None], *, debug: bool) -> int:
    """Runs a program to its end, and returns its exit status. An error is reported in one line on stderr.

    Args:
        name: The name of the program, with which the line begins.
        work: What the program does.
        debug: Whether the traceback of an error is shown as well.

    Returns:
        0, or 1 after an error, 2 if the arguments make no sense, or 130 after Ctrl-C.
    """
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        # SIGINT arrived before the signal handlers were installed.
        return 130
    except Exception as error:  # noqa: BLE001 - a user of a program must not see a traceback that was not asked for
        if debug:
            sys.stderr.write(printable("".join(traceback.format_exception(error))))
        sys.stderr.write(f"{name}: {one_line(_describe(error, debug=debug))}\n")
        return 2 if is_usage_error(error) else 1
    return 0


def _describe(error: Exception, *, debug: bool) -> str:
    if isinstance(error, LLMError | ImportError | OSError):
        return str(error)
    hint = "" if debug else "; run it again with --debug for the traceback"
    return f"unexpected {type(error).__name__}: {error}{hint}"
