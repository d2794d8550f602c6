"""The errors for time limits that have run out, and the names of the limits.

What each limit measures is decided where the waiting is: `Call.begin_attempt` applies `first_byte` and `total`,
`EventStream` applies `first_byte`, `idle` and `total`, `ForwardedResponse` applies `idle` and `total`, `RetryWaits`
applies `load`, and the session applies `connect`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from lmbridge.errors import LLMTimeoutError

Phase = Literal["connect", "load", "first_byte", "idle", "total"]
"""The name of a time limit: a field of `Timeouts`."""

CHECK_PROXY_HINT: Final = "check HTTP(S)_PROXY, or proxy= where it is passed"
"""What to do about a proxy that does not work."""
_RESOLVE_HINT: Final = (
    "the name server may be slow, or blocking calls may occupy all threads of the event loop's default executor;"
    " put an IP address into api_base, or raise Timeouts.connect"
)
_TIMEOUT_TEXTS: Final[Mapping[str, tuple[str, str]]] = {
    "proxy": ("the proxy did not open a connection to the server", CHECK_PROXY_HINT),
    "resolve": ("the host name was not resolved", _RESOLVE_HINT),
    "connect": (
        "could not connect",
        "check that the address is right, the host is up and, for https, speaks TLS; or raise Timeouts.connect",
    ),
    "load": (
        "the server did not finish loading its model",
        "raise Timeouts.load, or load the model first",
    ),
    "first_byte": (
        "the server did not answer",
        "it may be busy with other requests, with a long prompt, or with loading; raise Timeouts.first_byte",
    ),
    "idle": ("no further event arrived", "the server may have hung; raise Timeouts.idle if its model is that slow"),
    "total": ("the reply did not end", "raise Timeouts.total, or ask for fewer tokens"),
}
"""The message and the hint of the error for each time limit."""


def timed_out(
    phase: Phase, limit: float | None, cause: BaseException | None = None, *, step: str | None = None
) -> LLMTimeoutError:
    """Returns the error for a time limit that has run out.

    Args:
        phase: The name of the limit in `Timeouts`.
        limit: The limit in seconds, or None if it is not known.
        cause: The exception that caused the error.
        step: The step of connecting that took too long, "resolve" or "proxy", if it is known.
    """
    text, hint = _TIMEOUT_TEXTS[step or phase]
    return LLMTimeoutError(text if limit is None else f"{text} within {limit:g} s", cause, phase=phase, hint=hint)
