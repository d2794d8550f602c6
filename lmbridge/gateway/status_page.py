"""The status page: one file without any data, and the headers that it is served with.

The page shows names that clients and servers have chosen. Its script inserts them as text. Even if that failed, the
content security policy would let the browser run only the script of the page, which it recognizes by its hash.

Its data, `/status.json`, is made in `status`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from typing import Final

import attrs

_ELEMENT: Final = "<{0}>(.*?)</{0}>"
"""Matches an element without attributes. The page has one such element for its style, and one for its script."""


@attrs.frozen
class StatusPage:
    """A page, ready to be sent."""

    body: bytes
    """The HTML."""
    headers: Mapping[str, str]
    """The headers of the response, which forbid everything that the page does not need."""


def load_status_page() -> StatusPage:
    """Reads the page from the package, which blocks for a moment."""
    text = resources.files("lmbridge.gateway").joinpath("status.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash_of('style', text)}'; script-src '{_hash_of('script', text)}';"
        " connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return StatusPage(text.encode(), headers)


def _hash_of(element: str, page: str) -> str:
    (inside,) = re.findall(_ELEMENT.format(element), page, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}"
