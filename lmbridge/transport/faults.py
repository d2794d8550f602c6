"""The ways in which a connection can fail: what the error says, and whether a further attempt makes sense.

A table maps classes of exceptions to these faults. The table in this module has Python's own exceptions, and the one in
`lmbridge.transport.session` has aiohttp's, because only that module imports aiohttp. Both are searched from the top, so
the most specific class comes first.
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
    """One way in which a connection can fail."""

    message: str
    """What went wrong, as the error says it."""
    verdict: Verdict = Verdict.FAIL
    """Whether a further attempt makes sense."""
    hint: str | None = None
    """The next step for the user, which ends the text of the error; None where no advice would help."""
    unsent: bool = False
    """Whether the server has certainly not seen any part of the request."""


_START_SERVER: Final = "start the server there, or pass the right api_base"

UNKNOWN_HOST: Final = Fault("the host name cannot be resolved", hint="check api_base", unsent=True)
UNTRUSTED_CERTIFICATE: Final = Fault(
    "the server's certificate is not trusted",
    hint="pass ssl=ssl.create_default_context(cafile=...) with the authority that signed it",
    unsent=True,
)
TLS_FAILED: Final = Fault("the TLS handshake failed", hint="check whether api_base is https or http", unsent=True)
PROXY_UNREACHABLE: Final = Fault("the proxy cannot be reached", Verdict.RETRY, "check HTTP(S)_PROXY", unsent=True)
NOT_CONNECTED: Final = Fault("could not connect", Verdict.RETRY, _START_SERVER, unsent=True)
NO_RESPONSE: Final = Fault("the server closed the connection without an answer", Verdict.RETRY)
BROKEN_BEFORE_RESPONSE: Final = Fault("the connection broke before the server answered", Verdict.RETRY)
BROKEN_IN_BODY: Final = Fault("the connection broke in the middle of the answer")
NOT_HTTP: Final = Fault("the server's answer is not valid HTTP", hint=_START_SERVER)
NOT_SENT: Final = Fault("the request could not be sent")

FaultTable = Iterable[tuple[type[BaseException], Fault]]

PYTHON_FAULTS: Final[FaultTable] = (
    (socket.gaierror, UNKNOWN_HOST),
    (ssl.SSLCertVerificationError, UNTRUSTED_CERTIFICATE),
    (ssl.SSLError, TLS_FAILED),
    (ConnectionRefusedError, NOT_CONNECTED),
    (OSError, BROKEN_BEFORE_RESPONSE),
    (Exception, NOT_SENT),
)


def look_up_fault(exc: BaseException, table: FaultTable) -> Fault:
    """Returns the fault that an exception stands for. The first class in the table that matches decides."""
    return next(fault for kind, fault in table if isinstance(exc, kind))


def connection_failed(
    fault: Fault,
    reason: str = "",
    cause: BaseException | None = None,
    *,
    status: int | None = None,
    kind: type[ConnectionFailed] = ConnectionFailed,
) -> ConnectionFailed:
    """Returns the failure of an attempt, with the error that the user gets if it was the last attempt.

    Args:
        fault: What went wrong.
        reason: A more specific reason from the exception, such as "Connection refused".
        cause: The exception that caused the failure, or None if it must not be shown, because it contains a secret.
        status: The status of the response, or None if its head had not arrived.
        kind: The class of the failure.
    """
    message = f"{fault.message}: {reason}" if reason else fault.message
    error = LLMConnectionError(message, cause, hint=fault.hint, status=status)
    return kind(error, fault.verdict, unsent=fault.unsent)


Phase = Literal["connect", "load", "first_byte", "idle", "total"]

_TIMEOUT_TEXTS: Final[dict[Phase, tuple[str, str]]] = {
    "connect": (
        "could not connect",
        "check that the address is right and the host is up, or raise Timeouts.connect",
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


def timed_out(phase: Phase, limit: float | None, cause: BaseException | None = None) -> LLMTimeoutError:
    """Returns the error for a time limit that has run out.

    Args:
        phase: The name of the limit in `Timeouts`.
        limit: The limit in seconds, or None if it is not known.
        cause: The exception that caused the error.
    """
    message, hint = _TIMEOUT_TEXTS[phase]
    return LLMTimeoutError(message if limit is None else f"{message} within {limit:g} s", cause, phase=phase, hint=hint)


def describe_os_error(exc: BaseException) -> str:
    """Returns the reason that an exception gives, in plain words, such as "Connection refused"."""
    # The errno of an SSLError is a code of OpenSSL, and not one of the system.
    if isinstance(exc, ssl.SSLError):
        return exc.reason or str(exc)
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno)
    return str(exc) or type(exc).__name__


def failure_from(exc: LLMError | OSError, *, connect_timeout: float | None = None) -> ConnectionFailed:
    """Returns the failure that a test double simulates by raising an exception."""
    if isinstance(exc, LLMConnectionError):
        return ConnectionFailed(exc, Verdict.RETRY)
    if isinstance(exc, LLMError):
        return ConnectionFailed(exc)
    if isinstance(exc, TimeoutError):
        return ConnectionFailed(timed_out("connect", connect_timeout, exc), unsent=True)
    return connection_failed(look_up_fault(exc, PYTHON_FAULTS), describe_os_error(exc), exc)
