"""Checks the inputs of a model: the messages of a chat, the prompts of a completion, the texts of an embedding.

An invalid input raises an error before anything is sent, and the error names the place of the mistake. A server would
answer with a 500, with a 400 in the words of a C++ library, or as if something else had been asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmbridge._checks import MAPPING_TYPES, is_integer, wrong_type
from lmbridge.errors import LLMValidationError

Text = str | Sequence[int]
"""A text, as a string or as its token ids."""
Texts = Text | Sequence[Text]
"""One text, or several."""

_EXAMPLE_MESSAGES = "[{'role': 'user', 'content': 'Hello'}]"
_TEXTS_HINT = "give a string, a list of strings, or token ids: a list of numbers for each text"
# These tuples are for `isinstance`. Concrete types come first, because checks against abstract classes are slow.
_SEQUENCE_TYPES = (list, Sequence)
_STRING_TYPES = (str, bytes, bytearray)
_CONTENT_TYPES = (str, list, tuple)


class CheckedList(list[dict[str, Any]]):
    """Messages or tools that are known to be valid, and plain JSON, so that the checks of a request skip them.

    An agent uses this class: it checks each message and each tool once, instead of all of them at each request.
    """


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that the messages of a chat have the right shape.

    Raises:
        LLMValidationError: The list is empty, or a message has no role, or content that is neither a text nor a list.
    """
    if type(messages) is CheckedList:
        return
    if not isinstance(messages, _SEQUENCE_TYPES) or isinstance(messages, _STRING_TYPES):
        hint = f"for example {_EXAMPLE_MESSAGES}"
        if isinstance(messages, MAPPING_TYPES) and "messages" in messages:
            hint = "pass the fields of a body as arguments: chat_completion(**body)"
        raise wrong_type("messages", "a list of messages", messages, hint)
    if not messages:
        raise LLMValidationError("messages is empty", hint=f"give at least one message, like {_EXAMPLE_MESSAGES}")
    for number, message in enumerate(messages):
        if not isinstance(message, MAPPING_TYPES):
            raise wrong_type(f"messages[{number}]", "a dict", message, f"for example {_EXAMPLE_MESSAGES}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise LLMValidationError(
                f"messages[{number}] has no role", hint="add 'role': 'system', 'user', 'assistant' or 'tool'"
            )
        if content is not None and not isinstance(content, _CONTENT_TYPES):
            raise wrong_type(
                f"messages[{number}].content",
                "a string or a list of content parts",
                content,
                "for an image, see image_part()",
            )


def check_texts(name: str, value: Texts, *, allow_empty: bool = False) -> Sequence[Text]:
    """Checks an argument that is one text or several, and returns the list of its texts.

    Args:
        name: The name of the argument, for the error.
        value: The argument.
        allow_empty: Whether a text may be an empty string.

    Raises:
        LLMValidationError: The list is empty, or a text is empty, or an item is not a text.
    """
    if isinstance(value, str):
        _check_text_or_tokens(name, value, allow_empty)
        return [value]
    if not _is_list(value):
        raise wrong_type(name, "a text or a list of texts", value, _TEXTS_HINT)
    if not value:
        raise LLMValidationError(f"{name} is empty", hint="give at least one text")
    if is_integer(value[0]):
        _check_text_or_tokens(name, value, allow_empty)
        return [value]  # type: ignore[list-item]  # the line above has checked that these are token ids
    for number, text in enumerate(value):
        _check_text_or_tokens(f"{name}[{number}]", text, allow_empty)
    return value  # type: ignore[return-value]  # the loop above has checked each text


def _check_text_or_tokens(name: str, text: Any, allow_empty: bool) -> None:
    if isinstance(text, str):
        if not text and not allow_empty:
            raise LLMValidationError(f"{name} is an empty string", hint="leave it out: servers refuse an empty text")
        return
    if not _is_list(text):
        raise wrong_type(name, "a text", text, _TEXTS_HINT)
    if not text:
        raise LLMValidationError(f"{name} is an empty list", hint=_TEXTS_HINT)
    if not all(map(is_integer, text)):
        position = next(number for number, token in enumerate(text) if not is_integer(token))
        raise wrong_type(f"{name}[{position}]", "a token id (an integer)", text[position], _TEXTS_HINT)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
