"""Turns the results of tool calls into text for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

from lmbridge.mcp.servers.sanitize import sanitize_text


class McpText(str):
    """The text of a tool's result, with the result itself in the attribute `result`.

    As a string, it reaches the model verbatim. A program can still use the structured part of the result::

        text = await tool.function(city="Oslo")
        print(text, text.result.get("structuredContent"))
    """

    __slots__ = ("result",)
    result: Mapping[str, Any]
    """The result as the server sent it: `content`, `structuredContent`, `_meta`."""

    def __new__(cls, text: str, result: Mapping[str, Any]) -> Self:
        """Creates a string with the attribute `result`."""
        made = super().__new__(cls, text)
        made.result = result
        return made

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]  # a str has one argument
        """Returns the constructor's arguments, so that the text can be copied and pickled."""
        return str(self), self.result


def result_text(result: Mapping[str, Any]) -> str:
    """Returns a result as text: its text parts verbatim, and a line in brackets for each part of another kind.

    Several parts are joined by newlines. A link to a resource becomes a line that describes it; the
    resource is not fetched. If there are no parts, the structured content is returned as JSON.

    Args:
        result: The result as the server sent it.
    """
    content = result.get("content")
    parts = [_part_text(each) for each in content if isinstance(each, Mapping)] if isinstance(content, list) else []
    if not parts and result.get("structuredContent") is not None:
        return json.dumps(result["structuredContent"], ensure_ascii=False)
    return "\n".join(parts)


def _part_text(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind == "text":
        return str(part.get("text", ""))
    if kind in ("image", "audio"):
        return f"[{kind} {part.get('mimeType', '')}, {_describe_size(part.get('data'))}]"
    if kind == "resource":
        resource = part.get("resource")
        resource = resource if isinstance(resource, Mapping) else {}
        if isinstance(text := resource.get("text"), str):
            return text
        return f"[resource {_describe_resource(resource)}, {_describe_size(resource.get('blob'))}]"
    if kind == "resource_link":
        return f"[link to resource {_describe_resource(part)}]"
    return json.dumps(part, ensure_ascii=False)


def _describe_resource(resource: Mapping[str, Any]) -> str:
    values = [resource.get(key) for key in ("uri", "mimeType", "title", "name", "description")]
    return ", ".join(sanitize_text(str(each)) for each in values if each)


def _describe_size(data: Any) -> str:
    """Returns the number of bytes that a base64 string encodes, in words."""
    return f"{len(data.rstrip('=')) * 3 // 4:,} bytes" if isinstance(data, str) else "no data"
