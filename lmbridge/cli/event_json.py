"""The events of a run as JSON, for `lmbridge run --json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import attrs

from lmbridge.agent.events import RunEvent
from lmbridge.agent.tools import Tool
from lmbridge.errors import LLMError


def event_as_json(event: RunEvent) -> dict[str, Any]:
    """Returns an event as a JSON object: its `type`, such as "text_delta", and its fields."""
    return {"type": _snake_case(type(event).__name__), **_fields(event)}


def error_as_json(error: LLMError) -> dict[str, Any]:
    """Returns the error that ended a run, as the JSON object that is printed last."""
    return {"type": "error", "error": type(error).__name__, "message": str(error)}


_HIDDEN = frozenset({"raw", "log", "images"})
"""Fields that are left out: `raw`, the value that a tool returned, because the event has its text as well; `log`,
because each round was reported when it ended; and `images`, because they are large."""


def _fields(value: Any) -> dict[str, Any]:
    names = [each.name for each in attrs.fields(type(value)) if each.name not in _HIDDEN]
    return {name: _plain(getattr(value, name)) for name in names}


def _plain(value: Any) -> Any:
    """Converts any object to a value that can be encoded as JSON."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tool):
        return value.name
    if attrs.has(type(value)):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
