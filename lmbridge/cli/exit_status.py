"""The exit statuses of the commands, which docs/cli.md lists."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from lmbridge._checks import is_usage_error
from lmbridge.errors import (
    LLMAuthenticationError,
    LLMConnectionError,
    LLMError,
    LLMTimeoutError,
    MaxRoundsExceededError,
)


class ExitStatus(enum.IntEnum):
    """The status with which a command ends."""

    OK = 0
    """Everything worked."""
    FAILED = 1
    """The server or the model failed, or `doctor` found something broken."""
    USAGE = 2
    """The arguments make no sense, and nothing was sent."""
    NO_SERVER = 3
    """No server was found, or it cannot be reached, or it refused the key."""
    TIMEOUT = 4
    """The server did not answer in time."""
    LENGTH = 10
    """The answer was cut off, because a limit on tokens or the context was reached."""
    REPETITION = 11
    """A run ended because the model made the same call again and again."""
    BUDGET = 12
    """A run ended because its seconds or tokens were used up."""
    BAD_CALLS = 13
    """A run ended because the calls of the model could not be made."""
    MAX_ROUNDS = 14
    """A run ended because its rounds were used up."""
    INTERRUPTED = 130
    """Ctrl-C, as shells report it."""
    BROKEN_PIPE = 141
    """The program that read the output has ended, as shells report it."""
    TERMINATED = 143
    """SIGTERM, as shells report it."""


OF_STOP_REASON: Final[Mapping[str, ExitStatus]] = {
    "stop": ExitStatus.OK,
    "length": ExitStatus.LENGTH,
    "repetition": ExitStatus.REPETITION,
    "budget": ExitStatus.BUDGET,
    "bad_calls": ExitStatus.BAD_CALLS,
    "max_rounds": ExitStatus.MAX_ROUNDS,
}
"""The status of `lmbridge run` for each reason why a run ended."""

_OF_ERROR: Final[tuple[tuple[type[LLMError], ExitStatus], ...]] = (
    (MaxRoundsExceededError, ExitStatus.MAX_ROUNDS),
    (LLMAuthenticationError, ExitStatus.NO_SERVER),
    (LLMConnectionError, ExitStatus.NO_SERVER),
    (LLMTimeoutError, ExitStatus.TIMEOUT),
)
"""The exit status for each class of errors. The most specific classes come first."""


def exit_status_of(error: BaseException) -> ExitStatus:
    """Returns the exit status for an error that ends a command."""
    if is_usage_error(error):
        return ExitStatus.USAGE
    return next((status for kind, status in _OF_ERROR if isinstance(error, kind)), ExitStatus.FAILED)
