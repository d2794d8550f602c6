"""Checks the options of a transport that depend on each other, and derives URLs and secrets from them."""

from __future__ import annotations

from typing import Final

from lmbridge.config import check_proxy, environment_proxy, is_loopback, split_credentials
from lmbridge.errors import LLMValidationError
from lmbridge.transport.headers import basic_auth
from lmbridge.transport.socks import check_socks_proxy, is_socks

_ENVIRONMENT_PROXY: Final = "HTTP_PROXY or HTTPS_PROXY in the environment"


def choose_proxy(proxy: str | None, api_base: str, *, trust_env: bool, is_socket: bool) -> tuple[str | None, bool]:
    """Returns the proxy to use, and whether the environment is used for anything else as well.

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
        # aiohttp looks the proxy up again for each request. But it treats every URL as that of an HTTP proxy, and
        # ignores a proxy whose URL begins with https://.
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


def api_roots(api_base: str) -> tuple[str, str]:
    """Returns the URL that paths of the API are appended to, and that of the server itself."""
    if api_base.startswith("unix://"):
        return f"{api_base}/v1", api_base
    if api_base.endswith("#"):
        return api_base[:-1], api_base[:-1]
    return api_base, api_base.rpartition("/")[0]


def choose_auth(
    auth: tuple[str, str] | None, url_auth: tuple[str, str] | None, api_key: str | None
) -> tuple[str, str] | None:
    """Returns the user and the password to send.

    Raises:
        LLMValidationError: There are two ways to authenticate.
    """
    given = {"auth": auth, "the credentials in api_base": url_auth, "api_key": api_key}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise LLMValidationError(f"{' and '.join(names)} cannot be combined", hint="give only one of them")
    return auth or url_auth


def own_secrets(api_key: str | None, auth: tuple[str, str] | None, proxy: str | None) -> list[str]:
    """Returns the texts that no error may repeat."""
    secrets = [] if api_key is None else [api_key]
    if auth is not None:
        secrets += [auth[1], basic_auth(*auth).rpartition(" ")[2]]
    # A SOCKS proxy has credentials in the same place of its URL as an HTTP proxy.
    if proxy is not None and (proxy_auth := split_credentials(f"http:{proxy.partition(':')[2]}")[1]) is not None:
        secrets.append(proxy_auth[1])
    return secrets
