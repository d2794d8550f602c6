"""Redirects are not followed, because another server would get the key and the prompt. They are errors.

`lmbridge.transport.session` sends each request without following redirects, so a redirect arrives as a reply.
"""

from __future__ import annotations

import re
from typing import Final

from lmbridge.client.error_body import Redact
from lmbridge.errors import ErrorDetails, LLMResponseError
from lmbridge.transport.calls import Reply

_HINT: Final = (
    "redirects are not followed, because another server would get the key and the prompt; set api_base to the target"
)


def redirect_error(reply: Reply, redact: Redact, details: ErrorDetails) -> LLMResponseError:
    """Returns the error for a redirect, which names its target.

    Args:
        reply: The reply, whose status is 300 to 399.
        redact: Removes the secrets of the client from a text.
        details: The details of the error, apart from its hint.
    """
    target = _without_secrets(redact(reply.headers.get("Location", "nowhere")))
    details = {**details, "hint": _HINT}
    return LLMResponseError(f"the server redirects ({reply.status}) to {target}", **details)


def _without_secrets(location: str) -> str:
    """Returns the target of a redirect without credentials, query and fragment, which may hold secrets."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", location, maxsplit=1)[0])
