"""The ways in which a connection fails, and what each of them means: for the user, and for the next attempt.

This module has the meanings, and the classes of Python that announce them. The classes of aiohttp are paired with the
same meanings in `lmbridge.transport.session`, because only that module imports aiohttp. Both tables are searched from
the top, so the most specific class comes first.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable
from typing import Final, Literal

import attrs

from lmbridge.errors import LLMConnectionError, LLMError, LLMTimeoutError
from lmbridge.transport.http import ConnectionFailed
from lmbridge.transport.retry import Verdict


@attrs.frozen(eq=False)
class Fault:
    """One way in which a connection fails."""

    message: str
    """What went wrong, in the words of an error."""
    verdict: Verdict = Verdict.FAIL
    """Whether a further attempt makes sense."""
    hint: str | None = None
    """The next step for the user, which ends the text of the error; None if there is no good advice."""
    unsent: bool = False
    """Whether the server has certainly not seen any part of the request."""


_START_SERVER: Final = "start the server there, or pass the right api_base"

UNKNOWN_HOST: Final = Fault("the host name cannot be resolved", hint="check api_base", unsent=True)
UNTRUSTED_CERTIFICATE: Final = Fault(
    "the server's certificate is not trusted",
    hint="pass ssl=ssl.create_default_context(cafile=...) with the authority that signed it",
    unsent=True,
)
NO_TLS: Final = Fault("no TLS connection", hint="check whether api_base is https or http", unsent=True)
NO_PROXY: Final = Fault("the proxy cannot be reached", Verdict.RETRY, "check HTTP(S)_PROXY", unsent=True)
NOT_CONNECTED: Final = Fault("could not connect", Verdict.RETRY, _START_SERVER, unsent=True)
NO_RESPONSE: Final = Fault("the server closed the connection without an answer", Verdict.RETRY)
BROKEN_BEFORE_RESPONSE: Final = Fault("the connection broke before an answer", Verdict.RETRY)
BROKEN_IN_BODY: Final = Fault("the connection broke in the middle of the answer")
NOT_HTTP: Final = Fault("the server's answer is not proper HTTP", hint=_START_SERVER)
NOT_SENT: Final = Fault("the request could not be sent")

FaultTable = Iterable[tuple[type[BaseException], Fault]]

PYTHON_FAULTS: Final[FaultTable] = (
    (socket.gaierror, UNKNOWN_HOST),
    (ssl.SSLCertVerificationError, UNTRUSTED_CERTIFICATE),
    (ssl.SSLError, NO_TLS),
    (ConnectionRefusedError, NOT_CONNECTED),
    (OSError, BROKEN_BEFORE_RESPONSE),
    (Exception, NOT_SENT),
)


def find_fault(exc: BaseException, table: FaultTable) -> Fault:
    """Returns the meaning of an exception: that of the first class in the table of which it is an instance."""
    return next(fault for kind, fault in table if isinstance(exc, kind))


def connection_failed(
    fault: Fault,
    reason: str = "",
    cause: BaseException | None = None,
    *,
    status: int | None = None,
    kind: type[ConnectionFailed] = ConnectionFailed,
) -> ConnectionFailed:
    """Returns the failure of an attempt, with the error that the user gets if it was the last one.

    Args:
        fault: What went wrong.
        reason: What the exception adds to that, such as "Connection refused".
        cause: The exception behind the error, if it is safe to show.
        status: The status of the response, if its head had arrived.
        kind: The class of the failure.
    """
    message = f"{fault.message}: {reason}" if reason else fault.message
    error = LLMConnectionError(message, cause, hint=fault.hint, status=status)
    return kind(error, fault.verdict, unsent=fault.unsent)


Phase = Literal["connect", "load", "first_byte", "idle", "total"]

_PHASES: Final[dict[Phase, tuple[str, str]]] = {
    "connect": (
        "no connection",
        "check that the address is right and the host is up, or raise Timeouts.connect",
    ),
    "load": (
        "the server is still loading its model, not ready",
        "raise Timeouts.load, or load the model first",
    ),
    "first_byte": (
        "no answer",
        "the server may be busy with other requests, a long prompt or loading; raise Timeouts.first_byte",
    ),
    "idle": ("no further event", "the server may have hung; raise Timeouts.idle if its model is that slow"),
    "total": ("no end", "raise Timeouts.total, or ask for fewer tokens"),
}


def timed_out(phase: Phase, limit: float | None, cause: BaseException | None = None) -> LLMTimeoutError:
    """Returns the error for a time limit that has run out.

    Args:
        phase: The name of the limit in `Timeouts`.
        limit: Its seconds.
        cause: The exception behind the error.
    """
    message, hint = _PHASES[phase]
    return LLMTimeoutError(message if limit is None else f"{message} within {limit:g} s", cause, phase=phase, hint=hint)


def describe_os_error(exc: BaseException) -> str:
    """Returns what an exception adds to the meaning of its class, in words for people."""
    # The errno of an SSLError is OpenSSL's, not the system's.
    if isinstance(exc, ssl.SSLError):
        return exc.reason or str(exc)
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno)
    return str(exc) or type(exc).__name__


def failure_of(exc: LLMError | OSError, *, connect_timeout: float | None = None) -> ConnectionFailed:
    """Returns the failure that an error stands for when a test double raises it in place of a real connection."""
    if isinstance(exc, LLMConnectionError):
        return ConnectionFailed(exc, Verdict.RETRY)
    if isinstance(exc, LLMError):
        return ConnectionFailed(exc)
    if isinstance(exc, TimeoutError):
        return ConnectionFailed(timed_out("connect", connect_timeout, exc), unsent=True)
    return connection_failed(find_fault(exc, PYTHON_FAULTS), describe_os_error(exc), exc)
