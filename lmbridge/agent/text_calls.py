"""Recognizes tool calls that a model wrote into its text because the server did not parse them.

A whole reply has to consist of calls in one known syntax. A call that is quoted within an explanation is not made:
the model may be describing it, or warning against it.

The text is read once, from its beginning to its end, without copying the rest of it for each call. So the time grows
in proportion to the length: about 50 ms for 1,000,000 characters of short calls.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from lmbridge.client.reasoning import split_reasoning

_ARGUMENT_KEYS: Final = ("arguments", "parameters")
"""The keys that may hold the arguments of a call. Llama's models write `parameters`."""
_decode_at: Final = json.JSONDecoder().raw_decode


class _CallTags(NamedTuple):
    """The tags around each call in one syntax, with the white space that may surround the call and follow it."""

    opening: re.Pattern[str]
    closing: re.Pattern[str]


def _call_tags(opening: str, closing: str) -> _CallTags:
    return _CallTags(re.compile(rf"{re.escape(opening)}\s*"), re.compile(rf"\s*{re.escape(closing)}\s*"))


_SYNTAXES: Final = (
    # Hermes and Qwen.
    _call_tags("<tool_call>", "</tool_call>"),
    # LM Studio, which asks models without a native format to write it.
    _call_tags("[TOOL_REQUEST]", "[END_TOOL_REQUEST]"),
)


def read_text_calls(text: str) -> list[tuple[str, Any]] | None:
    """Returns the names and arguments of the calls that a reply consists of, or None if it is any other text.

    The arguments of a call that has none are None.

    Args:
        text: The whole reply. It may begin with the model's reasoning.
    """
    text = text.strip()
    syntax = _syntax_at_start(text)
    if syntax is None:
        # Only now, because tags of reasoning that appear inside the arguments of a call must stay there.
        text = split_reasoning({"choices": [{"message": {"content": text}}]}).text.strip()
        syntax = _syntax_at_start(text)
    return None if syntax is None else _parse_calls(text, syntax)


def _syntax_at_start(text: str) -> _CallTags | None:
    return next((syntax for syntax in _SYNTAXES if syntax.opening.match(text)), None)


def _parse_calls(text: str, syntax: _CallTags) -> list[tuple[str, Any]] | None:
    """Returns the calls, or None if the text contains anything else between or after them."""
    calls: list[tuple[str, Any]] = []
    position = 0
    while position < len(text):
        opening = syntax.opening.match(text, position)
        if opening is None:
            return None
        try:
            call, position = _decode_at(text, opening.end())
        except (ValueError, RecursionError):
            return None
        closing = syntax.closing.match(text, position)
        if closing is None or not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        calls.append((call["name"], _arguments_of(call)))
        position = closing.end()
    return calls


def _arguments_of(call: Mapping[str, Any]) -> Any:
    """Returns the arguments of a call, or None if it has none.

    If its two keys hold different arguments, both are returned as a list. No tool accepts a list, so the model reads
    that this is wrong, instead of one of the two being chosen for it.
    """
    given = [call[key] for key in _ARGUMENT_KEYS if call.get(key) is not None]
    if not given:
        return None
    return given[0] if given[0] == given[-1] else given


def to_wire_call(name: str, arguments: Any) -> Mapping[str, Any]:
    """Returns a call in the form of an entry of a message's `tool_calls`, with a new id.

    Args:
        name: The name of the tool in the request.
        arguments: The arguments as an object or as JSON text. None stands for a call without arguments, which becomes
            an empty text: `Toolset.read` decides whether the tool can be called like that.
    """
    arguments_json = arguments if isinstance(arguments, str) else "" if arguments is None else json.dumps(arguments)
    function = {"name": name, "arguments": arguments_json}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
