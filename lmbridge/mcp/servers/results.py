"""Turns the results of tool calls into text and images for the model.

A model reads text. Images are passed on as well, for models that can see. Everything else that is not text becomes a
line that describes it, unless its bytes are text after all, such as those of a JSON or SVG file.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, Self

from lmbridge.client.images import image_part
from lmbridge.errors import LLMValidationError
from lmbridge.mcp.servers.sanitize import sanitize_text
from lmbridge.types import ImagePart

_LARGEST_IMAGE: Final = 8 * 2**20
"""The size of the largest image that is passed on, in bytes. A larger one would hold up the event loop for too long."""
_MOST_IMAGES: Final = 8
"""How many images of one result are passed on."""
_LARGEST_TEXT: Final = 2**20
"""The size of the largest resource that is decoded to text, in bytes."""
_TEXT_TYPES: Final = re.compile(
    r"text/|application/([\w.-]+\+)?(json|xml|yaml|toml|javascript|sql|graphql|x-(sh|yaml|ndjson))\b|image/svg\+xml",
    re.IGNORECASE,
)
"""The media types whose bytes are text."""


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

    @property
    def image_parts(self) -> list[ImagePart]:
        """The images of the result that a model may be able to see, as content parts of a message.

        Only PNG, JPEG, GIF and WebP images of at most 8 MiB are returned, and of these only the first eight.
        """
        parts: list[ImagePart] = []
        for data in _image_data(self.result):
            if len(parts) < _MOST_IMAGES and (image := _decode_base64(data, _LARGEST_IMAGE)):
                # An image in another format is left out here: the model gets only the line that describes it.
                with suppress(LLMValidationError):
                    parts.append(image_part(image))
        return parts

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]  # a str has one argument
        """Returns the constructor's arguments, so that the text can be copied and pickled."""
        return str(self), self.result


def result_text(result: Mapping[str, Any]) -> str:
    """Returns a result as text: its text parts verbatim, and a line in brackets for each part that is not text.

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
        line = f"[{kind} {part.get('mimeType', '')}, {_describe_size(part.get('data'))}]"
        return _decode_text(part.get("mimeType"), part.get("data")) or line
    if kind == "resource":
        resource = part.get("resource")
        return _resource_text(resource if isinstance(resource, Mapping) else {})
    if kind == "resource_link":
        return f"[link to resource {_describe_resource(part)}]"
    return json.dumps(part, ensure_ascii=False)


def _resource_text(resource: Mapping[str, Any]) -> str:
    if isinstance(text := resource.get("text"), str):
        return text
    line = f"[resource {_describe_resource(resource)}, {_describe_size(resource.get('blob'))}]"
    return _decode_text(resource.get("mimeType"), resource.get("blob")) or line


def _describe_resource(resource: Mapping[str, Any]) -> str:
    values = [resource.get(key) for key in ("uri", "mimeType", "title", "name", "description")]
    return ", ".join(sanitize_text(str(each)) for each in values if each)


def _describe_size(data: Any) -> str:
    """Returns the number of bytes that a base64 string encodes, in words."""
    return f"{len(data.rstrip('=')) * 3 // 4:,} bytes" if isinstance(data, str) else "no data"


def _decode_text(media_type: Any, data: Any) -> str:
    """Returns the text that base64 data encodes if its media type says that it is text, or an empty string."""
    if not isinstance(media_type, str) or not _TEXT_TYPES.match(media_type):
        return ""
    try:
        return _decode_base64(data, _LARGEST_TEXT).decode()
    except UnicodeDecodeError:
        return ""


def _decode_base64(data: Any, largest: int) -> bytes:
    """Returns the bytes that a base64 string encodes, or no bytes if it is not valid or encodes more than `largest`.

    Some servers send a whole data URL, break the lines, or leave out the padding.
    """
    if not isinstance(data, str) or len(data) > largest * 3 // 2:
        return b""
    data = "".join(data[data.find(",") + 1 :].split())
    try:
        decoded = base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except ValueError:
        return b""
    return decoded if len(decoded) <= largest else b""


def _image_data(result: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the base64 data of the images in a result, those in resources included."""
    content = result.get("content")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            yield part.get("data")
        elif kind == "resource" and isinstance(resource := part.get("resource"), Mapping):
            is_image = str(resource.get("mimeType")).lower().startswith("image/")
            yield resource.get("blob") if is_image else None
