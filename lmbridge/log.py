"""Logging for scripts: one call that makes lmbridge's log lines visible.

A library must not configure logging by itself, and a program has its own configuration. A script of ten lines has none.
"""

from __future__ import annotations

import logging
from typing import Final, TextIO

from lmbridge._checks import check_bool, check_choice
from lmbridge.errors import LLMValidationError

_LEVELS: Final = ("debug", "info", "warning", "error")
_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _ScriptHandler(logging.StreamHandler[TextIO]):
    """The handler that `enable_logging` installs; its class distinguishes it from the handlers of the program."""


def enable_logging(level: str = "info", *, prompts: bool = False) -> None:
    """Writes lmbridge's log lines to standard error; for scripts that do not configure logging.

    For example::

        import lmbridge

        lmbridge.enable_logging("debug")

    Calling it again changes the level. A program that configures logging itself sets the level of the logger "lmbridge"
    instead: `logging.getLogger("lmbridge").setLevel("INFO")`.

    Args:
        level: "debug", "info", "warning" or "error", in upper or lower case. "info", the default, writes one line for
            each request; "debug" also writes about retries and waits.
        prompts: Whether the bodies of requests, which contain the prompts, are written as well. This requires the level
            "debug". Keys are replaced. Default: False. A program that configures logging itself calls
            `logging.getLogger("lmbridge.prompts").setLevel("DEBUG")` instead.

    Raises:
        LLMValidationError: The level is not one of these words, or `prompts` is set and the level is not "debug".
    """
    name = level.lower() if isinstance(level, str) else level
    check_choice("level", name, _LEVELS)
    if check_bool("prompts", prompts) and name != "debug":
        raise LLMValidationError(f"prompts are not written at level {name!r}", hint="pass level='debug'")
    logging.getLogger("lmbridge.prompts").setLevel("DEBUG" if prompts else "NOTSET")
    logger = logging.getLogger("lmbridge")
    for handler in [each for each in logger.handlers if isinstance(each, _ScriptHandler)]:
        logger.removeHandler(handler)
    # The handler is created anew, because a program may have replaced `sys.stderr` since the last call.
    handler = _ScriptHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger.addHandler(handler)
    logger.setLevel(name.upper())
    # The root logger may have a handler as well, and would write each line a second time.
    logger.propagate = False
