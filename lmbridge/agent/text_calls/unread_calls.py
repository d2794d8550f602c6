"""Recognizes answers that end in a tool call that could not be read.

`finding` reads the calls that a server has left in the text. A call that it cannot read, because it was cut off or
names no tool, is not an answer either, but nothing else about the reply shows that. This module only recognizes such a
call, so that the run can ask the model again, or warn about it.

Only the end of the text is examined. From there, a plain search looks backwards for the opening of each syntax, so that
even megabytes of markup take only a few milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

from lmbridge.agent.text_calls.call_reader import arguments_in
from lmbridge.agent.text_calls.finding import without_template_tokens
from lmbridge.agent.text_calls.syntaxes import AT_LINE_START, CALL_SYNTAXES

_MOST_MENTIONS: Final = 5
"""How many occurrences of an opening are examined, from the end of the text."""
_EXAMINED_CHARACTERS: Final = 500_000
"""How many characters at the end of an answer are examined."""


_UNREAD_SYNTAXES: Final = tuple(
    each for each in CALL_SYNTAXES if each.opening not in AT_LINE_START or each.opening.startswith("```")
)
"""The syntaxes whose calls are recognized even if they name no tool."""
_SIGN: Final = re.compile(r"[<\[`]|func")
"""Has a match in every opening of `_UNREAD_SYNTAXES`, so that a text without a match has none of them."""
_PLAIN_SIGN: Final = re.compile(r"\{|\)\]|Action Input:")
"""Has a match in every call that `_plain_call` or `_only_calls` recognizes."""
_JSON: Final = re.compile(r"\s*[\[{]")
_WORD: Final = re.compile(r"[^\W_]")
_PYTHONIC: Final = re.compile(r"^[ \t]*\[\s*([\w.-]{1,100})\(", re.MULTILINE)
_REACT: Final = re.compile(r"Action:[ \t]*([\w.-]{1,100})\s*\Z")
_NAMES: Final = ("name", "tool", "tool_name", "function", "action")
_NAME_KEYS: Final = tuple(f'"{each}"' for each in _NAMES)
"""Keys under which models write the name of a tool in a JSON object."""
_BRACE: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|[{}]')
"""Finds the braces of JSON, and skips those in its texts."""
_JSON_AT_START: Final = re.compile(r"\s*(?:```\w*\s*)?\{")
_ANOTHER_OBJECT: Final = re.compile(r"\s*(?:```\s*)?(?:```\w*\s*|[,;]\s*)?\{")
_LINE_OF_PROSE: Final = re.compile(r"^[ \t]*(?!(?:true|false|null)\b)[^\W\d_]", re.MULTILINE)
_CHARACTERS_BEFORE_NAME: Final = 20_000
"""How many characters before the name of a tool are searched for the beginning of its object."""
_JSON_NAME: Final = re.compile(r'"\w+"\s*:\s*"([^"\\]{1,100})"')
_ARGUMENTS: Final = re.compile(r'"(?:arguments|parameters|args|(?:tool_|action_)?input)"\s*:')

_decode_at: Final = json.JSONDecoder().raw_decode


def describe_markup(text: str, tool_names: Collection[str]) -> str | None:
    """Returns what is wrong with an answer that ends in markup which is not meant for its reader, or None.

    Args:
        text: The answer.
        tool_names: The names of the tools, as for `find_unread_call`.
    """
    text = text[-_EXAMINED_CHARACTERS:]
    answer = without_template_tokens(text)
    opening = _unread_call_in(answer, tool_names)
    if opening is not None:
        return f"the answer ends in a tool call that could not be read ({opening})"
    if len(answer) < len(text.rstrip()):
        return "the answer ends in tokens of the model's chat template"
    return None


def find_unread_call(text: str, tool_names: Collection[str]) -> str | None:
    """Returns the opening or the syntax of the call at the end of an answer; None if it does not end in a call.

    Args:
        text: The answer.
        tool_names: The names of the tools. Some syntaxes, such as JSON, also occur in ordinary texts. They count as
            calls only if they name a tool.
    """
    return _unread_call_in(without_template_tokens(text[-_EXAMINED_CHARACTERS:]), tool_names)


def _unread_call_in(text: str, tool_names: Collection[str]) -> str | None:
    """Does what `find_unread_call` does, for a text without the tokens of a chat template at its end."""
    # Nearly every answer has none of the signs, and therefore none of the openings.
    for syntax in [each for each in _UNREAD_SYNTAXES if each.opening in text] if _SIGN.search(text) else ():
        for position in _last_mentions(text, syntax.opening):
            content = position + len(syntax.opening)
            if syntax.content.match(text, content) and _is_last(text, content, syntax.closings):
                return syntax.opening
    if not tool_names or not _PLAIN_SIGN.search(text):
        return None
    return _plain_call(text, tool_names) or _only_calls(text, tool_names)


class JsonCall(NamedTuple):
    """A call that a model wrote as a JSON object at the beginning of a text."""

    name: str
    """The name of the tool."""
    arguments: Any
    """The arguments, which may be anything."""
    end: int
    """The position after the object."""


def first_json_call(text: str) -> JsonCall | None:
    """Returns the JSON call with which a text begins, or None if it begins with something else."""
    begin = _JSON_AT_START.match(text)
    if begin is None:
        return None
    try:
        call, end = _decode_at(text, begin.end() - 1)
    except (ValueError, RecursionError):
        return None
    name = next((call[key] for key in _NAMES if isinstance(call.get(key), str)), None)
    if name is None or _ARGUMENTS.search(text, begin.end(), end) is None:
        return None
    return JsonCall(name, arguments_in(call), end)


def repeats_its_call(text: str) -> bool:
    """Returns whether a text begins with a JSON call, and has the same call again later. Such a text rarely ends."""
    call = first_json_call(text)
    return call is not None and text.find(text[: call.end].strip(), call.end) >= 0


def repeated_unit(text: str) -> str | None:
    """Returns the repeated part of a text that consists of the same JSON call, again and again, until it was cut off.

    Returns:
        The first call, with the text that separates it from the second one. None if the text is anything else.
    """
    text = text.strip()
    call = first_json_call(text)
    if call is None:
        return None
    second = text.find(text[: call.end], call.end)
    # A text is periodic if it begins with its own rest.
    return text[:second] if second > 0 and text.startswith(text[second:]) else None


def _only_calls(text: str, tool_names: Collection[str]) -> str | None:
    """Returns "JSON" for an answer that consists of several calls in JSON, if the first of them names a tool.

    The other calls need not name a tool: a small model that writes call after call makes up tools, and arguments that
    are not JSON.
    """
    first = first_json_call(text)
    if first is None or first.name not in tool_names:
        return None
    is_followed_by_json = _ANOTHER_OBJECT.match(text, first.end) and not _LINE_OF_PROSE.search(text, first.end)
    return "JSON" if is_followed_by_json else None


def _last_mentions(text: str, words: str) -> Iterator[int]:
    position = len(text)
    for _ in range(_MOST_MENTIONS):
        position = text.rfind(words, 0, position)
        if position < 0:
            return
        yield position


def _is_last(text: str, content: int, closings: Sequence[str] = ()) -> bool:
    """Returns whether a call is cut off or followed only by punctuation. A call that text follows is only quoted."""
    ends = [end + len(closing) for closing in closings if (end := text.rfind(closing, content)) >= 0]
    if ends:
        return not _WORD.search(_without_closing_tags(text[max(ends) :]))
    if (begin := _JSON.match(text, content)) is None:
        return True
    try:
        _, end = _decode_at(text, begin.end() - 1)
    except (ValueError, RecursionError):
        return True
    return not _WORD.search(_without_closing_tags(text[end:]))


def _without_closing_tags(rest: str) -> str:
    return re.sub(r"</?[\w:|-]{1,40}>", "", rest[:1_000])


def _plain_call(text: str, tool_names: Collection[str]) -> str | None:
    """Returns the syntax of a call that has no tags but names a tool: JSON, Python's, or ReAct's."""
    keys = [key for key in _NAME_KEYS if key in text]
    for position in (each for key in keys for each in _last_mentions(text, key)):
        name = _JSON_NAME.match(text, position)
        if name is None or name[1] not in tool_names:
            continue
        objects = _objects_around(text, position)
        if objects and _ARGUMENTS.search(text, objects[0]) and _are_last(text, objects):
            return "JSON"
    if text.rstrip("` \n").endswith(")]") and any(each[1] in tool_names for each in _PYTHONIC.finditer(text)):
        return "a call in Python's syntax"
    for position in _last_mentions(text, "Action Input:"):
        action = _REACT.search(text[max(0, position - 200) : position])
        if action is not None and action[1] in tool_names:
            return "Action Input:"
    return None


def _objects_around(text: str, position: int) -> list[int]:
    """Returns the positions at which the JSON objects around a position begin, the innermost object first."""
    objects: list[int] = []
    for each in _BRACE.finditer(text, max(0, position - _CHARACTERS_BEFORE_NAME), position):
        if each[0] == "{":
            objects.append(each.start())
        elif each[0] == "}" and objects:
            objects.pop()
    return objects[::-1]


def _are_last(text: str, objects: Sequence[int]) -> bool:
    """Returns whether the innermost object, or an object around it, is the end of the text, as in `_is_last`."""
    if _is_last(text, objects[0]):
        return True
    for begin in objects[1:3]:
        try:
            _, end = _decode_at(text, begin)
        except (ValueError, RecursionError):
            return False
        if not _WORD.search(_without_closing_tags(text[end:])):
            return True
    return False
