"""Who may use a gateway: which names a request may address it by, where it may come from, and with which key.

A browser sends requests of any web page to any address, also to the loopback interface. A page cannot read the answers
of another site, but a name of its own that it lets point to 127.0.0.1 (DNS rebinding) makes the gateway its own site.
So the name in `Host` has to be one of the gateway's, and a request that says in `Origin` that it comes from the page of
another site is refused. Nothing is ever allowed to other sites: there are no CORS headers.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

from lmbridge.config import is_loopback
from lmbridge.gateway.problems import Problem

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?", re.IGNORECASE)
_HOST_HINT: Final = "use one of the gateway's own addresses, or add the name to its allowed_hosts"


class Access:
    """Checks the head of each request.

    Args:
        host: The address that the gateway listens on.
        api_key: The key that clients have to send, or None if they need none.
        allowed_hosts: Further names by which the gateway may be addressed.
    """

    def __init__(self, host: str, api_key: str | None, allowed_hosts: Iterable[str] = ()) -> None:
        self._key = api_key
        self._names = {name.lower().strip("[]") for name in (host, *allowed_hosts)}
        self._takes_addresses = not is_loopback(f"http://{bracketed(host)}")
        self._salt = secrets.token_bytes(16)

    @property
    def needs_key(self) -> bool:
        """Whether clients have to send a key."""
        return self._key is not None

    def check_source(self, method: str, headers: Mapping[str, str]) -> None:
        """Checks by which name the gateway is addressed, and where the request comes from.

        Raises:
            Problem: The request is refused.
        """
        host = headers.get("Host", "")
        if not self._is_own(host):
            shown = host[:100]
            raise Problem(403, f"this gateway is not {shown!r}", code="host_not_allowed", hint=_HOST_HINT)
        origin = headers.get("Origin")
        if origin is not None and urlsplit_netloc(origin) != host.lower():
            message = "requests from the pages of other sites are refused"
            raise Problem(403, message, code="origin_not_allowed", hint="send the request without a browser")
        if method == "OPTIONS":
            raise Problem(403, "this gateway offers nothing to other sites (CORS)", code="cors_not_allowed")

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Checks the key of a client.

        Raises:
            Problem: It is missing or wrong.
        """
        if self._key is None:
            return
        sent = key_in(headers)
        # The comparison takes the same time wherever the first difference is.
        if sent is None or not hmac.compare_digest(sent.encode("utf-8", "replace"), self._key.encode()):
            message = "the key is missing" if sent is None else "the key is wrong"
            hint = "send the gateway's key as `Authorization: Bearer`"
            raise Problem(401, message, code="invalid_api_key", hint=hint)

    def client_name(self, address: str, headers: Mapping[str, str]) -> str:
        """Returns a name for the client that sends a request: its address, and a label in place of its key.

        Where all clients have the same key, it says nothing about them. The label is another one after a restart.
        """
        sent = None if self.needs_key else key_in(headers)
        if sent is None:
            return address
        label = hmac.digest(self._salt, sent.encode("utf-8", "replace"), "sha256").hex()[:4]
        return f"{address} key {label}"

    def _is_own(self, host: str) -> bool:
        if not (found := _HOST.fullmatch(host)):
            return False
        name = found[1].lower().strip("[]").removesuffix(".")
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost"
        # A number cannot be made to point elsewhere, so it is as good as the address that the gateway listens on.
        return address.is_loopback or self._takes_addresses


def key_in(headers: Mapping[str, str]) -> str | None:
    """Returns the key that a client has sent, in the header of OpenAI's API or of Anthropic's."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("X-Api-Key") or None


def bracketed(host: str) -> str:
    """Returns a host as it stands in a URL, where an IPv6 address needs brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def urlsplit_netloc(origin: str) -> str:
    """Returns host and port of an origin, or an empty string if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
