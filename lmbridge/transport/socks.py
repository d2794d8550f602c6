"""Connections through a SOCKS proxy, which the package aiohttp-socks makes if it is installed.

This is the only module that imports it. lmbridge does not depend on it, because few people reach their model server
through such a proxy, and because it uses parts of aiohttp that are not public. The host name is resolved by the proxy.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from lmbridge.errors import LLMValidationError
from lmbridge.transport import faults
from lmbridge.transport.http_interface import ConnectionFailed
from lmbridge.transport.time_limits import timed_out

_SCHEMES: Final = {"socks5": "socks5", "socks5h": "socks5", "socks4": "socks4", "socks4a": "socks4"}
"""The schemes of SOCKS proxies, and the names by which aiohttp-socks knows them."""
_PORT: Final = 1080
_LOGIN_TEXTS: Final = ("No acceptable authentication methods", "authentication failure", "authentication method:")
"""Parts of the texts of exceptions for a refused login. No field distinguishes it from a malformed reply."""
_HTTP_STATUSES: Final = {0x02: 403, 0x5C: 407, 0x5D: 407}
"""The HTTP status that means the same as each of these codes of SOCKS 5 (below 0x5A) and SOCKS 4."""


def is_socks(proxy: str | None) -> bool:
    """Returns whether the URL of a proxy is that of a SOCKS proxy."""
    return proxy is not None and proxy.lower().startswith("socks")


def check_socks_proxy(proxy: str, *, name: str = "proxy") -> str:
    """Returns the URL of a SOCKS proxy.

    Raises:
        LLMValidationError: The URL is not valid, or aiohttp-socks is not installed.
    """
    scheme = proxy.partition(":")[0].lower()
    if scheme in _SCHEMES and importlib.util.find_spec("aiohttp_socks") is None:
        raise LLMValidationError(
            f"{name} is a {scheme} proxy, which lmbridge does not support by itself",
            hint="pip install aiohttp-socks; or use an HTTP proxy, or forward a port: ssh -L 1234:127.0.0.1:1234 HOST",
        )
    try:
        host = urlsplit(proxy).hostname if scheme in _SCHEMES else None
        _ = urlsplit(proxy).port
    except ValueError:
        host = None
    if not host:
        # The URL is not quoted, because it may contain a password.
        raise LLMValidationError(f"{name} is not a valid URL", hint="write it like 'socks5://127.0.0.1:1080'")
    return proxy


def make_connector(proxy: str, **options: Any) -> Any:
    """Returns a connector of aiohttp that connects through the proxy.

    Args:
        proxy: The URL of the proxy, which may contain a user and a password.
        **options: The options of aiohttp's `TCPConnector`.
    """
    from aiohttp_socks import ProxyConnector  # noqa: PLC0415 - it may not be installed

    scheme, _, rest = proxy.partition(":")
    url = f"{_SCHEMES[scheme.lower()]}:{rest}"
    if urlsplit(url).port is None:
        url = f"{url.rstrip('/')}:{_PORT}"
    return ProxyConnector.from_url(url, rdns=True, **options)


def socks_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that the connector for a SOCKS proxy raises besides those of aiohttp."""
    import aiohttp_socks  # noqa: PLC0415 - it may not be installed

    return (aiohttp_socks.ProxyError, aiohttp_socks.ProxyConnectionError, aiohttp_socks.ProxyTimeoutError)


def failure_of(exc: Exception, connect_timeout: float | None) -> ConnectionFailed:
    """Returns the failure that an exception of one of the classes from `socks_errors` stands for."""
    refused, unreachable, _ = socks_errors()
    if isinstance(exc, refused):
        return faults.connection_failed(_refusal_fault(exc), str(exc), exc)
    if isinstance(exc, unreachable):
        reason = exc.__cause__.__cause__ if exc.__cause__ is not None else None
        text = "" if reason is None else faults.describe_os_error(reason)
        return faults.connection_failed(faults.PROXY_UNREACHABLE, text, exc)
    return ConnectionFailed(timed_out("connect", connect_timeout, exc, step="proxy"), unsent=True)


def _refusal_fault(exc: Exception) -> faults.Fault:
    """Returns the fault for a proxy that did not open a connection to the server."""
    is_login = any(text in str(exc) for text in _LOGIN_TEXTS)
    status = 407 if is_login else _HTTP_STATUSES.get(getattr(exc, "error_code", None) or 0, 502)
    fault = faults.proxy_refusal(status)
    return attrs.evolve(fault, hint=(fault.hint or "").replace("http://", "socks5://"))
