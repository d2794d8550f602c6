"""Turns the results of tool calls into text and images for the model.

A model reads text. Images are passed on as well, for models that can see. Any other part of a result becomes a line
that describes it, unless its bytes are text after all, as in a JSON or SVG file.

What goes wrong with a call, such as an error of the protocol, becomes text in `ManagedServer.call`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Generator, Mapping
from contextlib import suppress
from typing import Any, Final, Self

from lmbridge._tasks import ITEMS_PER_STEP, run_at_once
from lmbridge._text import json_for_model
from lmbridge.client.images import image_part
from lmbridge.errors import LLMValidationError
from lmbridge.mcp.servers.sanitize import sanitize_text
from lmbridge.types import ImagePart

_LARGEST_IMAGE: Final = 8 * 2**20
"""The size of the largest image that is passed on, in bytes. A larger one would hold up the event loop for too long."""
_MOST_IMAGES: Final = 8
"""How many images of one result are passed on."""
_MOST_TRIED_IMAGES: Final = 64
"""How many images of one result are decoded at most, in search of those that can be passed on."""
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

    __slots__ = ("_images", "result")
    # The base64 data of the images in the result, or None before they have been looked for.
    _images: list[str] | None
    result: Mapping[str, Any]
    """The result as the server sent it: `content`, `structuredContent`, `_meta`."""

    def __new__(cls, text: str, result: Mapping[str, Any]) -> Self:
        """Creates a string with the attribute `result`."""
        made = super().__new__(cls, text)
        made.result = result
        made._images = None
        return made

    @property
    def image_parts(self) -> list[ImagePart]:
        """The images of the result that a model may be able to see, as content parts of a message.

        Only PNG, JPEG, GIF and WebP images of at most 8 MiB are returned, and no more than eight of them. If a result
        has more than 64 images, only the first 64 are considered.
        """
        parts: list[ImagePart] = []
        if self._images is None:
            self._images = run_at_once(read_result(self.result))._images  # noqa: SLF001 - it is another McpText
        for data in self._images or ():
            if len(parts) < _MOST_IMAGES and (image := _decode_base64(data, _LARGEST_IMAGE)):
                # An image in another format is left out here: the model gets only the line that describes it.
                with suppress(LLMValidationError):
                    parts.append(image_part(image))
        return parts

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]  # a str has one argument
        """Returns the constructor's arguments, so that the text can be copied and pickled."""
        return str(self), self.result


def read_result(result: Mapping[str, Any]) -> Generator[None, None, McpText]:
    """Returns a result as text: its text parts verbatim, and a line in brackets for each part that is not text.

    Several parts are joined by newlines. A link to a resource becomes a line that describes it; the resource is not
    fetched. If there are no parts, the structured content is returned as JSON.

    It is a generator that yields after every 100 parts, because a result may have a million of them.

    Args:
        result: The result as the server sent it.
    """
    content = result.get("content")
    texts: list[str] = []
    images: list[str] = []
    for number, part in enumerate(content if isinstance(content, list) else (), 1):
        if isinstance(part, Mapping):
            texts.append(_part_text(part))
            if len(images) < _MOST_TRIED_IMAGES and isinstance(data := _image_data(part), str):
                images.append(data)
        if number % ITEMS_PER_STEP == 0:
            yield
    structured = result.get("structuredContent")
    text = McpText("\n".join(texts) if texts or structured is None else json_for_model(structured), result)
    text._images = images  # noqa: SLF001 - see `McpText`
    return text


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
    return json_for_model(part)


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


def _image_data(part: Mapping[str, Any]) -> Any:
    """Returns the base64 data of a part that is an image, or a resource with an image; None for any other part."""
    kind = part.get("type")
    if kind == "image":
        return part.get("data")
    if kind == "resource" and isinstance(resource := part.get("resource"), Mapping):
        media_type = resource.get("mimeType")
        is_image = isinstance(media_type, str) and media_type.lower().startswith("image/")
        return resource.get("blob") if is_image else None
    return None
