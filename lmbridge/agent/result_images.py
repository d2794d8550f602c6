"""The images in results of tools, and where they are put in the messages of a run.

Servers differ in what they accept. The specification of chat completions allows images only in user messages, and LM
Studio answers 400 to a tool message that has one, as vLLM does for some models. So an image first goes into a user
message that follows the results. But some chat templates refuse a user message in this place. If the server refuses it,
the image goes into the tool message, which llama.cpp, for example, accepts. If the server refuses that as well, or if
the model does not support images, the result says that the model cannot see the image. A refusal is remembered for the
model if the error is clearly about the messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from lmbridge._checks import MAPPING_TYPES
from lmbridge.errors import LLMError, LLMResponseError, LLMStreamError

ImagePlace: TypeAlias = Literal["user", "tool", "none"]
"""Where images of results are sent: in a user message after the results, in the tool message, or nowhere."""

_NEXT_PLACE: Final[Mapping[ImagePlace, ImagePlace]] = {"user": "tool", "tool": "none"}
"""The place to try when a server has refused images in another one."""
NOT_SHOWN: Final = "[You cannot see the image, because this model or its server does not take images.]"
"""What the model reads in place of an image."""

_REFUSING_STATUSES: Final = (400, 404, 415, 422, 500, 501)
"""The statuses of refusals. llama.cpp answers 500 to an image for a model that has no projector."""
_MOST_CHARACTERS: Final = 5_000
"""How many characters of an error are searched."""
_SAYS_NO_IMAGES: Final = re.compile(r"\bimages?\b|\bvision\b|\bmulti-?modal|\bmmproj\b", re.IGNORECASE)
_CONCERNS_MESSAGES: Final = re.compile(
    r"\bimages?\b|\bvision\b|\bmulti-?modal|\bmmproj\b|\bmessages\b|\bcontent\b|\brole|\btool|\bassistant\b|\btemplate\b",
    re.IGNORECASE,
)
"""Matches errors that are about the messages. Other errors, such as that of a driver, may not occur again."""
_SAYS_WHERE: Final = re.compile(r"\brole|\btool|\bassistant\b", re.IGNORECASE)


def split_images(result: Any) -> tuple[Any, tuple[Mapping[str, Any], ...]]:
    """Returns the result of a tool without its images, and the images as content parts.

    A result has images if it is an image part (see `image_part`), a list of texts, text parts and image parts, or a
    string with an attribute `image_parts`, such as the results of MCP tools.
    """
    if isinstance(result, str):
        return result, tuple(getattr(result, "image_parts", ()))
    parts = result if isinstance(result, list | tuple) else [result]
    images = tuple(each for each in parts if _is_image(each))
    if not images or not all(_is_image(each) or _part_text(each) is not None for each in parts):
        return result, ()
    return "\n".join(_describe_image(each) if _is_image(each) else _part_text(each) or "" for each in parts), images


def next_place(place: ImagePlace, error: LLMError) -> ImagePlace | None:
    """Returns where images can be sent after an error, or None if the error is not a refusal of images.

    Args:
        place: The place in which the last request had images that the server had not accepted before.
        error: The error of that request.
    """
    # An error of a subclass has another reason, such as a context that is too short.
    is_refusal = type(error) is LLMResponseError and (error.status or 200) in (*_REFUSING_STATUSES, 200)
    if place == "none" or not (is_refusal or type(error) is LLMStreamError):
        return None
    text = _text_of_error(error)
    if _SAYS_NO_IMAGES.search(text) and not _SAYS_WHERE.search(text):
        return "none"
    return _NEXT_PLACE[place]


def place_after(place: ImagePlace, errors: Sequence[LLMError]) -> ImagePlace:
    """Returns the place that later runs should use, after errors about images in this run.

    An error that is not about the messages, such as that of a driver, proves nothing, so it changes nothing.

    Args:
        place: The place in which images were sent first.
        errors: The errors, in order. After each of them, the images were sent in the `next_place`.
    """
    for error in errors:
        following = next_place(place, error)
        if following is None or not _CONCERNS_MESSAGES.search(_text_of_error(error)):
            break
        place = following
    return place


def _text_of_error(error: LLMError) -> str:
    return f"{error.message} {error.body or ''}"[:_MOST_CHARACTERS]


def _is_image(part: Any) -> bool:
    if not isinstance(part, MAPPING_TYPES) or part.get("type") != "image_url":
        return False
    image = part.get("image_url")
    return isinstance(image, Mapping) and isinstance(image.get("url"), str)


def _part_text(part: Any) -> str | None:
    if isinstance(part, Mapping) and part.get("type") == "text":
        part = part.get("text")
    return part if isinstance(part, str) else None


def _describe_image(part: Mapping[str, Any]) -> str:
    """Returns the line that replaces an image in the text of a result."""
    head, _, data = str(part["image_url"]["url"]).partition(",")
    kind = head.removeprefix("data:").partition(";")[0] if head.startswith("data:") else ""
    return f"[image {kind}, {len(data.rstrip('=')) * 3 // 4:,} bytes]" if kind else "[image]"


def image_messages(names: Sequence[str], images: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns a list with the user message that shows the images of results. Without images, the list is empty.

    Args:
        names: The names of the tools that were called.
        images: The images of each result.
    """
    content: list[Mapping[str, Any]] = []
    for name, parts in zip(names, images, strict=True):
        if parts:
            what = "This image is" if len(parts) == 1 else f"These {len(parts)} images are"
            content += [{"type": "text", "text": f"[{what} part of the result of the tool {name}.]"}, *parts]
    return [{"role": "user", "content": content}] if content else []
