"""Chooses the proxy of a transport: the one that was passed, that of the environment, or none."""

from __future__ import annotations

from typing import Final

from lmbridge.config import check_proxy, environment_proxy, is_loopback
from lmbridge.errors import LLMValidationError
from lmbridge.transport.socks import check_socks_proxy, is_socks

_ENVIRONMENT_PROXY: Final = "HTTP_PROXY or HTTPS_PROXY in the environment"


def choose_proxy(proxy: str | None, api_base: str, *, trust_env: bool, is_socket: bool) -> tuple[str | None, bool]:
    """Returns the proxy to use, or None, and whether aiohttp may look up proxies and `.netrc` in the environment.

    The environment is used only if the caller wants it, and never for a loopback address or a Unix socket.

    Args:
        proxy: The proxy that was passed, or None. It takes precedence over the environment.
        api_base: The URL of the server.
        trust_env: Whether the caller wants the environment to be used.
        is_socket: Whether the server is reached through a Unix socket.

    Raises:
        LLMValidationError: The proxy cannot be used.
    """
    chosen = check_any_proxy(proxy, "proxy")
    if chosen is not None and is_socket:
        raise LLMValidationError("a Unix socket cannot be reached through a proxy", hint="leave out proxy=")
    uses_environment = trust_env and not is_socket and not is_loopback(api_base)
    if uses_environment and chosen is None:
        # A proxy whose URL begins with http:// is left to aiohttp, which looks it up again for each request. Any other
        # one is checked here, because aiohttp would take a SOCKS proxy for an HTTP proxy, and ignore an https:// URL.
        found = environment_proxy(api_base)
        chosen = None if (found or "").startswith("http://") else check_any_proxy(found, _ENVIRONMENT_PROXY)
    return chosen, uses_environment


def check_any_proxy(proxy: str | None, name: str) -> str | None:
    """Returns the URL of an HTTP or SOCKS proxy, or None for no proxy.

    Raises:
        LLMValidationError: The value is not such a URL, or the proxy cannot be used.
    """
    if isinstance(proxy, str) and is_socks(proxy):
        return check_socks_proxy(proxy, name=name)
    return check_proxy(proxy, name=name)
