"""The ways in which a connection can fail: what the error says, and whether a further attempt makes sense.

A table maps classes of exceptions to these faults. The table in this module has Python's own exceptions, and the one in
`lmbridge.transport.session` has aiohttp's, because only that module imports aiohttp. Both are searched from the top, so
the most specific class comes first.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Iterable
from typing import Final

import attrs

from lmbridge._text import shorten
from lmbridge.errors import LLMConnectionError, LLMError, LLMResponseError
from lmbridge.transport.http_interface import ConnectionFailed
from lmbridge.transport.retry import Verdict
from lmbridge.transport.time_limits import CHECK_PROXY_HINT, timed_out


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
    """Whether it is certain that the server has not seen any part of the request."""
    blames_server: bool = True
    """Whether the server may be the cause. If not, the failure says nothing about the server's health."""


_START_SERVER: Final = "start the server there, or pass the right api_base"

UNKNOWN_HOST: Final = Fault("the host name cannot be resolved", hint="check api_base", unsent=True)
_TRUST_HINT: Final = "pass ssl=ssl.create_default_context(cafile=...) with the authority that signed it"
UNTRUSTED_CERTIFICATE: Final = Fault("the server's certificate is not trusted", hint=_TRUST_HINT, unsent=True)
TLS_FAILED: Final = Fault("the TLS handshake failed", hint="check whether api_base is https or http", unsent=True)
PROXY_UNREACHABLE: Final = Fault("the proxy cannot be reached", Verdict.RETRY, CHECK_PROXY_HINT, unsent=True)
NOT_CONNECTED: Final = Fault("could not connect", Verdict.RETRY, _START_SERVER, unsent=True)
NO_RESPONSE: Final = Fault(
    "the server closed the connection without an answer",
    Verdict.RETRY,
    "see the server's own log; if the server expects TLS, api_base must begin with https://",
)
BROKEN_BEFORE_RESPONSE: Final = Fault("the connection broke before the server answered", Verdict.RETRY)
BROKEN_IN_BODY: Final = Fault("the connection broke in the middle of the answer")
NOT_HTTP: Final = Fault("the server's answer is not valid HTTP", hint=_START_SERVER)
TLS_IN_PLACE_OF_HTTP: Final = Fault(
    "the server answered with TLS in place of HTTP", hint="api_base must begin with https://"
)
_CHECK_HEADERS: Final = "the server, or a proxy in front of it, sends headers that are too long or too many"
HEAD_TOO_LARGE: Final = Fault("the head of the server's answer is larger than 64 KiB", hint=_CHECK_HEADERS)
TOO_MANY_HEADERS: Final = Fault("the server's answer has more than 128 headers or trailers", hint=_CHECK_HEADERS)
TOO_MUCH_FRAMING: Final = Fault(
    "the server's answer has more than 64 KiB of chunk sizes, extensions or trailers in one place",
    hint="the server, or a proxy in front of it, sends a broken chunked body",
)
UNSUPPORTED_ENCODING: Final = Fault(
    "the server's answer is compressed in a way that lmbridge does not support",
    hint="make the server, or the proxy in front of it, send gzip, deflate or no compression, which is all that"
    " lmbridge asks for; leave Accept-Encoding out of headers=",
    blames_server=False,
)
BROKEN_COMPRESSION: Final = Fault(
    "the server's answer cannot be decompressed",
    hint="switch off the compression in the server or in the proxy in front of it",
)
NOT_SENT: Final = Fault("the request could not be sent", blames_server=False)

FaultTable = Iterable[tuple[type[BaseException], Fault]]
"""Classes of exceptions, each with the fault that it stands for. The first class that matches decides."""

PYTHON_FAULTS: Final[FaultTable] = (
    (socket.gaierror, UNKNOWN_HOST),
    (ssl.SSLCertVerificationError, UNTRUSTED_CERTIFICATE),
    (ssl.SSLError, TLS_FAILED),
    (ConnectionRefusedError, NOT_CONNECTED),
    (OSError, BROKEN_BEFORE_RESPONSE),
    (Exception, NOT_SENT),
)
"""The faults that Python's own exceptions stand for, most specific first."""


# TLS

_OTHER_NAME_HINT: Final = "use a name in api_base that the certificate contains, or issue a certificate for this one"
_SELF_SIGNED_HINT: Final = (
    "pass ssl=ssl.create_default_context(cafile=...) with this certificate, or with the one at the end of its chain"
)
_UNKNOWN_AUTHORITY_HINT: Final = f"{_TRUST_HINT}; the server must also send the intermediate certificates"
_RULES_HINT: Final = (
    "issue a new certificate that follows the rule; until then, pass ssl=context with a context that does not check it:"
    " context = ssl.create_default_context(cafile=...); context.verify_flags &= ~ssl.VERIFY_X509_STRICT"
)
_CERTIFICATE_FAULTS: Final[Iterable[tuple[tuple[int, ...], str, str]]] = (
    ((62, 64), "is for another host name", _OTHER_NAME_HINT),
    ((10,), "has expired", "renew it on the server, or check the clock of this machine"),
    ((9,), "is not valid yet", "check the clocks of this machine and of the server"),
    ((18, 19), "is self-signed", _SELF_SIGNED_HINT),
    ((2, 20, 21), "was signed by an authority that this machine does not know", _UNKNOWN_AUTHORITY_HINT),
    ((23,), "has been revoked", "issue a new certificate"),
    # Python 3.13 and later check these rules (79 and higher) by default.
    ((24, 26, 32, 79, *range(85, 95)), "breaks a rule for certificates", _RULES_HINT),
)
"""What is wrong with a certificate, and the hint, for each `verify_code` of Python (X509_V_ERR_* of OpenSSL)."""
_HANDSHAKE_FAULTS: Final[Iterable[tuple[tuple[str, ...], str, str]]] = (
    (
        ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"),
        "the server does not speak TLS",
        "check whether api_base is https or http: without TLS, it must begin with http://",
    ),
    (
        ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE"),
        "the server refused the TLS handshake",
        "if it requires a certificate of the client, pass ssl= with a context on which load_cert_chain() was called",
    ),
    (
        ("UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION", "NO_PROTOCOLS_AVAILABLE", "NO_CIPHERS", "DH_KEY_TOO_SMALL"),
        "the server and this machine have no version or cipher of TLS in common",
        "update the server, or pass ssl= with a context that allows what it offers",
    ),
    (("UNRECOGNIZED_NAME",), "the server does not know its host name", "use a name in api_base that it serves"),
)
"""Parts of the reasons that OpenSSL gives for a failed handshake, with the message and the hint for them."""


def tls_fault(exc: ssl.SSLError) -> Fault:
    """Returns the fault that an error of TLS stands for, judging by the reason that OpenSSL gives."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        for codes, what, hint in _CERTIFICATE_FAULTS:
            if getattr(exc, "verify_code", 0) in codes:
                return attrs.evolve(
                    UNTRUSTED_CERTIFICATE, message=f"{UNTRUSTED_CERTIFICATE.message}: it {what}", hint=hint
                )
        return UNTRUSTED_CERTIFICATE
    reason = _openssl_reason(exc)
    for parts, message, hint in _HANDSHAKE_FAULTS:
        if any(part in reason for part in parts):
            return attrs.evolve(TLS_FAILED, message=f"{TLS_FAILED.message}: {message}", hint=hint)
    return TLS_FAILED


def _openssl_reason(exc: ssl.SSLError) -> str:
    # Only the errors that OpenSSL raises have the attribute.
    return getattr(exc, "reason", None) or str(exc)


# Proxies

_BROKEN_TUNNEL: Final = Fault(
    "could not connect to the server through the proxy",
    Verdict.RETRY,
    "check that the proxy can reach the server, and that api_base is right",
    unsent=True,
)


def blamed_on_proxy(fault: Fault, *, unsent: bool) -> Fault:
    """Returns the fault for a failure that concerns the proxy, and not the server behind it.

    Args:
        fault: The fault that the failure would be if there were no proxy.
        unsent: Whether the proxy had not even opened a connection to the server.
    """
    if fault in (NOT_CONNECTED, PROXY_UNREACHABLE):
        return PROXY_UNREACHABLE
    message = fault.message.replace("the server", "the proxy").replace("the host name", "the host name of the proxy")
    hint = (fault.hint or "").replace("api_base", "proxy=") if "certificate" in message else CHECK_PROXY_HINT
    return attrs.evolve(fault, message=message, hint=hint, unsent=unsent or fault.unsent)


def proxy_refusal(status: int) -> Fault:
    """Returns the fault for a proxy that did not open a connection to the server, by the status of its answer."""
    if status == 407:
        return Fault(
            "the proxy requires a user and a password, or refused those that it got",
            hint="put them into the URL of the proxy: http://user:password@host:port",
            unsent=True,
        )
    if status >= 500:
        hint = "check api_base, and that the proxy can reach it"
        return Fault("the proxy could not connect to the server", Verdict.RETRY, hint, unsent=True)
    hint = "allow the address in the proxy, or go without it: leave out proxy=, or set NO_PROXY"
    return Fault("the proxy refused to connect to the server", hint=hint, unsent=True)


def seen_through_proxy(fault: Fault) -> Fault:
    """Returns the fault for a failure of the connection to the server that a proxy has opened."""
    return _BROKEN_TUNNEL if fault is NOT_CONNECTED else fault


# Making failures


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
    return kind(error, fault.verdict, unsent=fault.unsent, blames_server=fault.blames_server)


def unsupported_encoding(encoding: str, status: int) -> ConnectionFailed:
    """Returns the failure for a response whose body is compressed in a way that is not supported."""
    message = f"{UNSUPPORTED_ENCODING.message}: {shorten(encoding, 100)}"
    error = LLMResponseError(message, hint=UNSUPPORTED_ENCODING.hint, status=status)
    return ConnectionFailed(error, UNSUPPORTED_ENCODING.verdict, blames_server=UNSUPPORTED_ENCODING.blames_server)


def describe_os_error(exc: BaseException) -> str:
    """Returns the reason that an exception gives, in plain words, such as "Connection refused"."""
    # The errno of an SSLError is a code of OpenSSL, and that of a gaierror one of the resolver.
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"{_openssl_reason(exc)} ({exc.verify_message})" if hasattr(exc, "verify_message") else str(exc)
    if isinstance(exc, ssl.SSLError):
        return _openssl_reason(exc)
    if isinstance(exc, socket.gaierror):
        return exc.strerror or str(exc)
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno > 0:
        # On Windows, `os.strerror` has no text for errors of sockets, but the exception contains the system's text. On
        # other systems, the exception may contain a text of asyncio instead, such as "Connect call failed ('127.0.0.1',
        # 1234)", so `os.strerror` is used.
        return (sys.platform == "win32" and exc.strerror) or os.strerror(exc.errno)
    return str(exc) or type(exc).__name__


def failure_from(exc: LLMError | OSError, *, connect_timeout: float | None = None) -> ConnectionFailed:
    """Returns the failure that a test double simulates by raising an exception."""
    if isinstance(exc, LLMConnectionError):
        return ConnectionFailed(exc, Verdict.RETRY)
    if isinstance(exc, LLMError):
        return ConnectionFailed(exc)
    if isinstance(exc, TimeoutError):
        return ConnectionFailed(timed_out("connect", connect_timeout, exc), unsent=True)
    fault = tls_fault(exc) if isinstance(exc, ssl.SSLError) else look_up_fault(exc, PYTHON_FAULTS)
    return connection_failed(fault, describe_os_error(exc), exc)
