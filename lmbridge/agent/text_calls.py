"""Recognizes tool calls that a model wrote into its text because the server did not parse them.

A reply has to end in calls of one known syntax, and may have text before them. A call that is quoted within an
explanation is not made, because the model may be describing it, or warning against it: neither one that is followed by
more text, nor one in a code block or a block quote.

The text is read once, from its beginning to its end, without copying the rest of it for each call. So the time grows
in proportion to the length: about 50 ms for 1,000,000 characters of short calls.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from lmbridge.agent.argument_json import decode_written_at, write_json
from lmbridge.client.reasoning import split_reasoning

_ARGUMENT_KEYS: Final = ("arguments", "parameters")
"""The keys that may hold the arguments of a call. Llama's models write `parameters`."""
# Tokens that begin a call, such as `<|python_tag|>`, are not among them.
_TEMPLATE_TOKEN: Final = re.compile(
    r"<\|(?!python|tool)[\w/-]{1,40}\|>|</?s>|<(?:end|start)_of_turn>|<\uff5c(?!tool)[^\uff5c<>\n]{1,40}\uff5c>"
)
_LONGEST_TOKEN: Final = 44
_LONGEST_OPENING: Final = 20
_CODE_FENCE: Final = "```"
_FENCE_LINE: Final = re.compile(r"^[ \t>]*(`{3,}|~{3,})(.*)$", re.MULTILINE)
_NEXT_OBJECT: Final = re.compile(r"\s*\{")


class TextCalls(NamedTuple):
    """The calls that a reply ends in."""

    text: str
    """The text before them."""
    calls: list[tuple[str, str | None]]
    """Their names and the JSON of their arguments; None for a call without arguments."""


class _CallTags(NamedTuple):
    """The tags around each call in one syntax, with the white space that may surround the call and follow it."""

    opening: re.Pattern[str]
    closing: re.Pattern[str]


def _call_tags(opening: str, closing: str) -> _CallTags:
    return _CallTags(re.compile(rf"{re.escape(opening)}\s*"), re.compile(rf"\s*{re.escape(closing)}\s*"))


_READ_SYNTAXES: Final = (
    # Hermes and Qwen.
    _call_tags("<tool_call>", "</tool_call>"),
    # LM Studio, which asks models without a native format to write it.
    _call_tags("[TOOL_REQUEST]", "[END_TOOL_REQUEST]"),
)


def read_text_calls(text: str) -> TextCalls | None:
    """Returns the calls that a reply ends in and the text before them, or None if it is any other text.

    Args:
        text: The whole reply. It may begin with the model's reasoning.
    """
    text = without_template_tokens(text.strip())
    syntax = _syntax_at_start(text)
    if syntax is None:
        # Only now, because tags of reasoning that appear inside the arguments of a call must stay there.
        text = split_reasoning({"choices": [{"message": {"content": text}}]}).text.strip()
        syntax = _syntax_at_start(text)
    if syntax is not None:
        calls = _parse_calls(text, 0, syntax)
        return TextCalls("", calls) if calls else None
    return _read_calls_after_text(text)


def _read_calls_after_text(text: str) -> TextCalls | None:
    openings = [opening for syntax in _READ_SYNTAXES if (opening := syntax.opening.search(text))]
    if not openings:
        return None
    # From the first tag on there has to be nothing but calls, so that none is left out because it is quoted or wrong.
    begin = min(opening.start() for opening in openings)
    before, syntax = text[:begin].rstrip(), _syntax_at_start(text[begin : begin + _LONGEST_OPENING])
    calls = None if _is_quoted(text, begin) or syntax is None else _parse_calls(text, begin, syntax)
    return TextCalls(before, calls) if calls else None


def _is_quoted(text: str, position: int) -> bool:
    """Returns whether a position is within a code block, or in a line of a block quote, or follows a backtick."""
    before = text[:position]
    if before[before.rfind("\n") + 1 :].lstrip().startswith(">"):
        return True
    before = before.rstrip()
    if before.count(_CODE_FENCE) % 2 or (before.endswith("`") and not before.endswith(_CODE_FENCE)):
        return True
    fence = ""
    for line in _FENCE_LINE.finditer(before):
        if not fence:
            fence = line[1]
        elif line[1].startswith(fence) and not line[2].strip():
            fence = ""
    return bool(fence)


def _syntax_at_start(text: str) -> _CallTags | None:
    return next((syntax for syntax in _READ_SYNTAXES if syntax.opening.match(text)), None)


def _parse_calls(text: str, position: int, syntax: _CallTags) -> list[tuple[str, str | None]] | None:
    """Returns the calls from a position on, or None if there is anything else between or after them."""
    calls: list[tuple[str, str | None]] = []
    while position < len(text):
        opening = syntax.opening.match(text, position)
        if opening is None:
            return None
        try:
            call, position = decode_written_at(text, opening.end())
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            arguments = _arguments_of(call)
            # Some models write a call, or its arguments, a second time.
            while (more := _NEXT_OBJECT.match(text, position)) is not None:
                again, position = decode_written_at(text, more.end() - 1)
                if again not in (call, arguments):
                    return None
            written = arguments if arguments is None or isinstance(arguments, str) else write_json(arguments)
        except (ValueError, RecursionError):
            return None
        closing = syntax.closing.match(text, position)
        if closing is None:
            return None
        calls.append((call["name"], written))
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


def without_template_tokens(text: str) -> str:
    """Returns a text without tokens of a chat template at its end, such as `<|im_end|>`, and the white space there."""
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        begin = text.rfind("<", max(0, end - _LONGEST_TOKEN), end)
        if begin < 0 or not _TEMPLATE_TOKEN.fullmatch(text, begin, end):
            return text[:end]
        end = begin


def without_repetition(arguments: str) -> str:
    """Returns the arguments of a call once if they are the same JSON object several times, one after the other.

    Servers send them twice when they repeat all arguments at the end of a stream (vLLM, Mistral). Any other text is
    returned unchanged.
    """
    text = arguments.strip()
    try:
        first, end = decode_written_at(text)
        position = end
        while (more := _NEXT_OBJECT.match(text, position)) is not None:
            again, position = decode_written_at(text, more.end() - 1)
            if again != first:
                return arguments
    except (ValueError, RecursionError):
        return arguments
    return text[:end] if isinstance(first, dict) and end < position == len(text) else arguments


def to_wire_call(name: str, arguments: str | None) -> Mapping[str, Any]:
    """Returns a call in the form of an entry of a message's `tool_calls`, with a new id.

    Args:
        name: The name of the tool in the request.
        arguments: The JSON of the arguments. None stands for a call without arguments, which becomes an empty text:
            `Toolset.read` decides whether the tool can be called like that.
    """
    function = {"name": name, "arguments": "" if arguments is None else without_repetition(arguments)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
