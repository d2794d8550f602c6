"""Results of tools as text for a model, and what a model is told of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Self

from lmbridge._text import shorten

_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_HIDDEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"  # of no width, or of direction
    "\U000e0000-\U000e007f]"  # tags
)
_VALUES: Final = ("const", "default", "enum", "examples")
_DESCRIPTIONS: Final = ("description", "title")
_LONGEST: Final = 4_000
"""Characters of a description."""


class McpText(str):
    """A result as text, with the result itself.

    Attributes:
        result: As the server sent it: `content`, `structuredContent`, `_meta`.
    """

    __slots__ = ("result",)
    result: Mapping[str, Any]

    def __new__(cls, text: str, result: Mapping[str, Any]) -> Self:
        """The text, with its result."""
        made = super().__new__(cls, text)
        made.result = result
        return made

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]  # of a str, it is the text
        """For copies, and for other processes."""
        return str(self), self.result


def text_of(result: Mapping[str, Any]) -> str:
    """A result as text: its texts as they are, a line each, and a line in brackets for what is none.

    Nothing is fetched: a link to a resource is shown.

    Args:
        result: As the server sent it.
    """
    content = result.get("content")
    parts = [_part(each) for each in content if isinstance(each, Mapping)] if isinstance(content, list) else []
    if not parts and result.get("structuredContent") is not None:
        return json.dumps(result["structuredContent"], ensure_ascii=False)
    return "\n".join(parts)


def _part(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind == "text":
        return str(part.get("text", ""))
    if kind in ("image", "audio"):
        return f"[{kind} {part.get('mimeType', '')}, {_size(part.get('data'))}]"
    if kind == "resource":
        resource = part.get("resource")
        resource = resource if isinstance(resource, Mapping) else {}
        if isinstance(text := resource.get("text"), str):
            return text
        return f"[resource {_named(resource)}, {_size(resource.get('blob'))}]"
    if kind == "resource_link":
        return f"[link to resource {_named(part)}]"
    return json.dumps(part, ensure_ascii=False)


def _named(resource: Mapping[str, Any]) -> str:
    told = [resource.get(key) for key in ("uri", "mimeType", "title", "name", "description")]
    return ", ".join(clean(str(each)) for each in told if each)


def _size(data: Any) -> str:
    """The bytes that a text in base64 stands for."""
    return f"{len(data.rstrip('=')) * 3 // 4:,} bytes" if isinstance(data, str) else "no data"


def clean(text: str) -> str:
    """A text without what people do not see and models do: escape sequences, control and formatting characters."""
    return _HIDDEN.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def description_of(definition: Mapping[str, Any]) -> str:
    """What a tool does, in its server's words."""
    for text in (definition.get("description"), definition.get("title")):
        if isinstance(text, str) and text.strip():
            return shorten(clean(text).strip(), _LONGEST)
    return ""


def clean_schema(schema: Any) -> Any:
    """A schema with its descriptions cleaned, and nothing else changed."""
    if isinstance(schema, list):
        return [clean_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: clean(value)
        if key in _DESCRIPTIONS and isinstance(value, str)
        else value
        if key in _VALUES
        else clean_schema(value)
        for key, value in schema.items()
    }


def hints_of(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's hints, those that its server did not give as the specification reads them: the worst.

    They are a server's own words: nothing makes them true.
    """
    given = definition.get("annotations")
    given = given if isinstance(given, Mapping) else {}
    reads = given.get("readOnlyHint") is True
    worst = {"readOnlyHint": False, "destructiveHint": not reads, "idempotentHint": False, "openWorldHint": True}
    return {**worst, **{key: value for key, value in given.items() if value is not None}}
