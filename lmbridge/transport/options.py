"""Checks the options of a transport that depend on each other, and derives URLs and secrets from them.

Headers, proxies and time limits are checked in `headers`, `proxies` and `config`.
"""

from __future__ import annotations

from lmbridge.config import split_credentials
from lmbridge.errors import LLMValidationError
from lmbridge.transport.headers import basic_auth


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
    """Returns the user and the password to send, or None if there are none.

    Raises:
        LLMValidationError: More than one way to authenticate was given.
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
