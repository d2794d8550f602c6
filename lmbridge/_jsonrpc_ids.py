"""Reads the ids of JSON-RPC messages, even those that servers write in a wrong form.

`lmbridge.testing` uses this module to record what MCP servers send, and must not import any layer. So this module
belongs to the ground floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_LONGEST_ID: Final = 20
"""The number of digits that are read of an id in a string. The ids of lmbridge have ten digits."""


def read_id(value: Any) -> str | int | None:
    """Returns the id of a request, however the server that answers has written it, or None if the value is not an id.

    Some servers return a number as a text or as a float. Such an id becomes the number that the request was sent with.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        # Python refuses to convert numbers of thousands of digits.
        return int(value[:_LONGEST_ID])
    return value if isinstance(value, str | int) else None


def is_answer(message: Mapping[str, Any]) -> bool:
    """Returns whether a message is an answer, even if its sender repeats the method of the request in it."""
    return "method" not in message or ("id" in message and ("result" in message or "error" in message))
