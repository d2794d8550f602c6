"""Tool calls that a model wrote as text, because its server did not read them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, Final

from lmbridge.client.reasoning import split_reasoning

_SYNTAXES: Final = (("<tool_call>", "</tool_call>"), ("[TOOL_REQUEST]", "[END_TOOL_REQUEST]"))
"""Of Hermes and Qwen; of LM Studio, which asks models for it that have none of their own."""


def read_text_calls(text: str) -> list[tuple[str, Any]] | None:
    """The names and arguments of the calls that a whole answer consists of; None if it is anything else.

    Args:
        text: The answer, with what the model thought before it or without.
    """
    for syntax in _SYNTAXES:
        if (whole := _answer(text, syntax[0])) is not None:
            return _calls(whole, *syntax)
    return None


def _answer(text: str, opening: str) -> str | None:
    """The answer after any thinking, if it begins like that."""
    if not text.lstrip().startswith(opening):  # what is in a call is no thinking, whatever tags it has
        text = split_reasoning({"choices": [{"message": {"content": text}}]}).text
    text = text.strip()
    return text if text.startswith(opening) else None


def _calls(text: str, opening: str, closing: str) -> list[tuple[str, Any]] | None:
    calls: list[tuple[str, Any]] = []
    while text:
        if not text.startswith(opening):
            return None
        text = text.removeprefix(opening).lstrip()
        try:
            call, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        text = text[end:].lstrip()
        if not text.startswith(closing) or not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        calls.append((call["name"], call.get("arguments")))
        text = text.removeprefix(closing).lstrip()
    return calls


def wire_call(name: str, arguments: Any) -> Mapping[str, Any]:
    """The call as a server would have sent it.

    Args:
        name: The name that was offered.
        arguments: An object, its JSON, or None.
    """
    written = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
    function = {"name": name, "arguments": written}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
