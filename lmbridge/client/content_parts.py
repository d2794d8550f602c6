"""Content that a server sends as a list of parts instead of a text.

OpenAI's API has such lists only in requests. Some servers send them in replies as well: Mistral's models put their
reasoning into a separate part, and proxies pass on what Anthropic's API returns. lmbridge guarantees that the content
of a reply is a text. So reasoning and refusals are moved to the fields in which other servers send them, and parts that
hold no text are moved to the field `content_parts`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Final, NamedTuple

from lmbridge._tasks import ITEMS_PER_STEP, run_at_once

_REASONING_TYPES: Final = frozenset({"thinking", "reasoning", "reasoning_text", "redacted_thinking"})
_TEXT_KEYS: Final = ("text", "thinking", "reasoning", "content", "summary")
"""The fields of a part that may hold its text, or a list of parts with the text."""
_DEEPEST_PARTS: Final = 8
"""How deep parts may be nested; what lies deeper is ignored. Servers nest them twice."""


class SortedContent(NamedTuple):
    """The parts of a content, sorted by their kind."""

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
    return run_at_once(_sort_in_slices(content))


def _sort_in_slices(content: object) -> Generator[None, None, SortedContent]:
    """Does what `sort_content` does, as a generator that yields after every 100 pieces."""
    if isinstance(content, str):
        return SortedContent(content, "", "", [])
    sorted_content: dict[str, list[Any]] = {field: [] for field in SortedContent._fields}
    for number, (field, piece) in enumerate(_pieces_of(content), 1):
        sorted_content[field].append(piece)
        if number % ITEMS_PER_STEP == 0:
            yield
    text, reasoning, refusal, others = sorted_content.values()
    return SortedContent("".join(text), "".join(reasoning), "".join(refusal), others)


def _pieces_of(content: object) -> Iterator[tuple[str, Any]]:
    """Yields the pieces of the parts, each with the field of `SortedContent` that it belongs to."""
    for part in content if isinstance(content, list | tuple) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in _REASONING_TYPES:
            yield from (("reasoning", text) for text in _texts_of(part))
        elif isinstance(part, Mapping) and isinstance(words := part.get("refusal"), str):
            yield "refusal", words
        elif isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            yield from (("text", text) for text in _texts_of(part))
        elif part is not None:
            yield "other_parts", part
        else:
            yield "text", ""


def text_of_part(part: object) -> str:
    """Returns the text of a part or of a list of parts, whatever they are; an empty string if they have none."""
    if isinstance(part, str):
        return part
    return "".join(_texts_of(part)) if part else ""


def text_in_slices(part: object) -> Generator[None, None, str]:
    """Does what `text_of_part` does, as a generator that yields after every 100 pieces."""
    texts: list[str] = []
    for text in _texts_of(part):
        texts.append(text)
        if len(texts) % ITEMS_PER_STEP == 0:
            yield
    return "".join(texts)


def _texts_of(part: object, depth: int = 0) -> Iterator[str]:
    """Yields the text of a part in pieces. A part without a text has an empty piece, so that each part has a piece."""
    if isinstance(part, str):
        yield part
    elif depth <= _DEEPEST_PARTS and part and isinstance(part, list | tuple):
        for each in part:
            yield from _texts_of(each, depth + 1)
    elif depth <= _DEEPEST_PARTS and isinstance(part, Mapping):
        for key in _TEXT_KEYS:
            has_text = False
            for text in _texts_of(part.get(key), depth + 1):
                has_text |= bool(text)
                yield text
            if has_text:
                return
    else:
        yield ""


def flatten_content(message: dict[str, Any]) -> None:
    """Replaces the content of a message, or of a piece of one, by its text if it consists of parts.

    Reasoning and refusals are put into the fields `reasoning_content` and `refusal`, and parts that hold no text into
    `content_parts`, so that nothing is lost.
    """
    # Nearly every content is a text, or none.
    if consists_of_parts(message.get("content")):
        run_at_once(flatten_in_slices(message))


def consists_of_parts(content: object) -> bool:
    """Returns whether a content is a part or a list of parts, and not a text."""
    return content is not None and not isinstance(content, str) and isinstance(content, list | tuple | Mapping)


def flatten_in_slices(message: dict[str, Any]) -> Generator[None, None, None]:
    """Does what `flatten_content` does, as a generator that yields after every 100 pieces."""
    content = message.get("content")
    if not consists_of_parts(content):
        return
    text, reasoning, refusal, other_parts = yield from _sort_in_slices(content)
    message["content"] = text
    for key, words in (("reasoning_content", reasoning), ("refusal", refusal)):
        if words:
            message[key] = (yield from text_in_slices(message.get(key))) + words
    if other_parts:
        message["content_parts"] = other_parts
