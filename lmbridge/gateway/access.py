"""Who may use a gateway: by which names it may be addressed, from which sites, and with which key.

A browser lets any web page send requests to any address, including the loopback interface. A page cannot read the
answers of another site. But its author can make a domain name point to 127.0.0.1 (DNS rebinding), and the browser then
takes the gateway for the page's own site. `lmbridge._http_access` has the check against that. The gateway sends no CORS
headers, so other sites are never allowed to read its answers.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Mapping
from typing import Final

from lmbridge._http_access import HostNames, bearer_token, is_same_key, is_same_origin
from lmbridge.gateway.gateway_errors import Problem

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
        self._names = HostNames(host, allowed_hosts)
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
        if not self._names.accepts(host):
            shown = host[:100]
            message = f"this gateway does not accept the host name {shown!r}"
            raise Problem(403, message, code="host_not_allowed", hint=_HOST_HINT)
        origin = headers.get("Origin")
        if origin is not None and not is_same_origin(origin, host):
            message = "requests from the pages of other sites are refused"
            raise Problem(403, message, code="origin_not_allowed", hint="send it from a program, not from a web page")
        if method == "OPTIONS":
            raise Problem(403, "this gateway does not allow requests from other sites (CORS)", code="cors_not_allowed")

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Checks the key of a client.

        Raises:
            Problem: The key is missing or wrong.
        """
        if self._key is None:
            return
        sent = key_in(headers)
        if sent is None or not is_same_key(sent, self._key):
            message = "the key is missing" if sent is None else "the key is wrong"
            hint = "send the gateway's key as `Authorization: Bearer`"
            raise Problem(401, message, code="invalid_api_key", hint=hint)

    def client_name(self, address: str, headers: Mapping[str, str]) -> str:
        """Returns a name for the client that sends a request: its address, and a label in place of its key.

        If all clients have to send the same key, the name has no label. Labels change when the gateway is restarted.
        """
        sent = None if self.needs_key else key_in(headers)
        if sent is None:
            return address
        label = hmac.digest(self._salt, sent.encode("utf-8", "replace"), "sha256").hex()[:4]
        return f"{address} key {label}"


def key_in(headers: Mapping[str, str]) -> str | None:
    """Returns the key that a client has sent, in the header of OpenAI's API or of Anthropic's."""
    return bearer_token(headers.get("Authorization", "")) or headers.get("X-Api-Key") or None
