"""Texts, and texts as token ids: the prompts of a text completion, the inputs of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmbridge._checks import is_integer
from lmbridge.errors import LLMValidationError

Text = str | Sequence[int]
"""A text, or its token ids."""
Texts = Text | Sequence[Text]

_HINT = "give a string, a list of strings, or token ids: a list of numbers for each text"


def checked_texts(name: str, value: Texts, *, may_be_empty: bool = False) -> Sequence[Text]:
    """The single texts of an argument that may be one text or several.

    Args:
        name: Of the argument, for the error.
        value: What was given.
        may_be_empty: Whether a text may be an empty string.

    Raises:
        LLMValidationError: it is no text, or holds none, or an empty one.
    """
    if isinstance(value, str):
        _check(name, value, may_be_empty)
        return [value]
    if not _is_list(value):
        raise LLMValidationError(f"{name} is {_kind(value)}", hint=_HINT)
    if not value:
        raise LLMValidationError(f"{name} is empty", hint="give at least one text")
    if is_integer(value[0]):
        _check(name, value, may_be_empty)
        return [value]  # type: ignore[list-item]  # it has been checked just now
    for number, text in enumerate(value):
        _check(f"{name}[{number}]", text, may_be_empty)
    return value  # type: ignore[return-value]  # as above


def _check(name: str, text: Any, may_be_empty: bool) -> None:
    if isinstance(text, str):
        if not text and not may_be_empty:
            raise LLMValidationError(f"{name} is an empty string", hint="leave it out: servers refuse an empty text")
        return
    if not _is_list(text):
        raise LLMValidationError(f"{name} is {_kind(text)}", hint=_HINT)
    if not text:
        raise LLMValidationError(f"{name} is an empty list", hint=_HINT)
    if not all(map(is_integer, text)):
        wrong = next(number for number, token in enumerate(text) if not is_integer(token))
        raise LLMValidationError(f"{name}[{wrong}] is {_kind(text[wrong])} among token ids", hint=_HINT)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
