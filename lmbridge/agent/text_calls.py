"""Recognizes tool calls that a model wrote into its text because the server did not parse them.

A whole reply has to consist of calls in one known syntax. A call that is quoted within an explanation is not made:
the model may be describing it, or warning against it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, Final

from lmbridge.client.reasoning import split_reasoning

_CALL_TAGS: Final = (
    # Hermes and Qwen.
    ("<tool_call>", "</tool_call>"),
    # LM Studio, which asks models without a native format to write it.
    ("[TOOL_REQUEST]", "[END_TOOL_REQUEST]"),
)


def read_text_calls(text: str) -> list[tuple[str, Any]] | None:
    """Returns the names and arguments of the calls that a reply consists of, or None if it is any other text.

    Args:
        text: The whole reply. It may begin with the model's reasoning.
    """
    for opening, closing in _CALL_TAGS:
        if (reply := _reply_starting_with(opening, text)) is not None:
            return _parse_calls(reply, opening, closing)
    return None


def _reply_starting_with(opening: str, text: str) -> str | None:
    """Returns the reply without its reasoning, or None unless it starts with the opening tag."""
    # Tags of reasoning that appear inside the arguments of a call must stay there.
    if not text.lstrip().startswith(opening):
        text = split_reasoning({"choices": [{"message": {"content": text}}]}).text
    text = text.strip()
    return text if text.startswith(opening) else None


def _parse_calls(text: str, opening: str, closing: str) -> list[tuple[str, Any]] | None:
    """Returns the calls, or None if the text contains anything else between or after them."""
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


def to_wire_call(name: str, arguments: Any) -> Mapping[str, Any]:
    """Returns a call in the form of an entry of a message's `tool_calls`, with a new id.

    Args:
        name: The name of the tool in the request.
        arguments: The arguments as an object or as JSON text, or None if the call has no arguments.
    """
    arguments_json = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
    function = {"name": name, "arguments": arguments_json}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
