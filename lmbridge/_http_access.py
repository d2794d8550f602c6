"""Decides who may use an HTTP server of lmbridge: by which names it may be addressed, and with which key.

A browser lets any web page send requests to any address, including the loopback interface. A page cannot read the
answers of another site. But its author can make a domain name point to 127.0.0.1 (DNS rebinding), and the browser then
treats the server as the page's own site. So the name in `Host` has to be one of the server's names, and `Origin`, if it
is sent, has to name the same host.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from lmbridge.config import is_loopback

_NAME: Final = r"\[[0-9a-f:.]+\]|[a-z0-9_.-]+"
_HOST: Final = re.compile(rf"({_NAME})(:[0-9]{{1,5}})?", re.IGNORECASE)


class HostNames:
    """The names by which a server may be addressed.

    Args:
        host: The address that the server listens on.
        allowed: Further names that are accepted.
    """

    def __init__(self, host: str, allowed: Iterable[str] = ()) -> None:
        self._names = {name.lower().strip("[]") for name in (host, *allowed)}
        self._accepts_other_addresses = not is_loopback(f"http://{bracketed(host)}")

    def accepts(self, host: str) -> bool:
        """Returns whether the value of the header `Host` names the server."""
        if not (found := _HOST.fullmatch(host)):
            return False
        name = found[1].lower().strip("[]").removesuffix(".")
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost"
        # Unlike a domain name, an IP address cannot be made to point to another host, so it is always accepted by a
        # server that listens on more than the loopback interface.
        return address.is_loopback or self._accepts_other_addresses


def is_same_origin(origin: str, host: str) -> bool:
    """Returns whether the headers `Origin` and `Host` name the same host and port."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def bearer_token(authorization: str) -> str | None:
    """Returns the token in the value of the header `Authorization`, or None if it has none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def is_same_key(sent: str, key: str) -> bool:
    """Returns whether a client has sent the right key, in a time that does not depend on where the keys differ."""
    # A byte that is not valid UTF-8 has been decoded to half of a surrogate pair. It must not become another character.
    return hmac.compare_digest(sent.encode("utf-8", "surrogatepass"), key.encode("utf-8", "surrogatepass"))


def is_host_name(text: str) -> bool:
    """Returns whether a text is the name or the address of a host, as it stands in `Host` before the port."""
    return re.fullmatch(_NAME, bracketed(text), re.IGNORECASE) is not None


def bracketed(host: str) -> str:
    """Returns a host as it stands in a URL, where an IPv6 address needs brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
