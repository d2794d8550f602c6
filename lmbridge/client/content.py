"""Content that a server sends as a list of parts instead of a text.

OpenAI's API has such lists only in requests. Some servers send them in replies as well: Mistral's models put their
reasoning into a separate part, and proxies pass on what Anthropic's API returns. lmbridge guarantees that the content
of a reply is a text, so the parts are sorted into the fields that other servers use for the same things.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

_REASONING_TYPES: Final = frozenset({"thinking", "reasoning", "reasoning_text", "redacted_thinking"})
_TEXT_KEYS: Final = ("text", "thinking", "reasoning", "content", "summary")
"""The fields of a part that may hold its text, or a list of parts with the text."""
_DEEPEST_PARTS: Final = 8
"""How deep parts may be nested; what lies deeper is ignored. Servers nest them twice."""


class SortedContent(NamedTuple):
    """The parts of a content, by what they are."""

    text: str
    """The text of the answer."""
    reasoning: str
    """The text of the reasoning."""
    refusal: str
    """The text of a refusal."""
    other_parts: list[Any]
    """The parts that hold no text, such as images."""


def sort_content(content: object) -> SortedContent:
    """Sorts a content of any shape: a text, a part, a list of parts, or None."""
    if isinstance(content, str):
        return SortedContent(content, "", "", [])
    text, reasoning, refusal, others = [], [], [], []
    for part in content if isinstance(content, list | tuple) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in _REASONING_TYPES:
            reasoning.append(text_of_part(part))
        elif isinstance(part, Mapping) and isinstance(words := part.get("refusal"), str):
            refusal.append(words)
        elif isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            text.append(text_of_part(part))
        elif part is not None:
            others.append(part)
    return SortedContent("".join(text), "".join(reasoning), "".join(refusal), others)


def text_of_part(part: object, depth: int = 0) -> str:
    """Returns the text of a part or of a list of parts, whatever they are; an empty string if they have none."""
    if isinstance(part, str):
        return part
    if part is None or depth > _DEEPEST_PARTS:
        return ""
    if isinstance(part, list | tuple):
        return "".join(text_of_part(each, depth + 1) for each in part)
    if isinstance(part, Mapping):
        return next(filter(None, (text_of_part(part.get(key), depth + 1) for key in _TEXT_KEYS)), "")
    return ""


def flatten_content(message: dict[str, Any]) -> None:
    """Replaces the content of a message, or of a piece of one, by its text if it consists of parts.

    Reasoning and refusals are put into the fields `reasoning_content` and `refusal`, and parts that hold no text into
    `content_parts`, so that nothing is lost.
    """
    content = message.get("content")
    # Nearly every content is a text, or none.
    if content is None or isinstance(content, str) or not isinstance(content, list | tuple | Mapping):
        return
    text, reasoning, refusal, other_parts = sort_content(content)
    message["content"] = text
    for key, words in (("reasoning_content", reasoning), ("refusal", refusal)):
        if words:
            message[key] = text_of_part(message.get(key)) + words
    if other_parts:
        message["content_parts"] = other_parts
