"""Recognizes answers that end in a tool call which nothing has read.

A server whose parser does not fit the model, or a model that does not keep to its template, leaves the call in the
text. Such a text is not an answer, but nothing else about the reply shows that. This module only recognizes it, so that
the run can warn; reading the calls is the task of `text_calls`.

Only the end of the text is examined. Each syntax is looked for from there, with a plain search for the words that it
begins with, so that even megabytes of markup take a few milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

from lmbridge.agent.text_calls import without_template_tokens

_MOST_MENTIONS: Final = 5
"""How many mentions of the words that a syntax begins with are examined, from the end of the text."""
_EXAMINED_CHARACTERS: Final = 500_000
"""How many characters at the end of an answer are examined."""


class _Syntax(NamedTuple):
    """A syntax of calls, by the words that it begins with."""

    opening: str
    """The first words of a call."""
    content: re.Pattern[str]
    """What follows them if they are the beginning of a call, and not merely mentioned."""
    closing: str = ""
    """The last words of a call, after which there may be more text; empty if the syntax has none."""


_END_OR_JSON: Final = re.compile(r"\s*(?:\Z|[\[{<])")
_NAME_AND_MORE: Final = re.compile(r"\s*(?:\Z|[\[{<]|[\w.-]{1,100}\s*(?:[\[({<]|\Z))")
_ANYTHING: Final = re.compile("")

_UNREAD_SYNTAXES: Final = (
    # Hermes, Qwen, GLM (whose name stands before `<arg_key>`), and MiniMax.
    _Syntax("<tool_call>", _NAME_AND_MORE, "</tool_call>"),
    _Syntax("<tool_calls>", _END_OR_JSON, "</tool_calls>"),
    _Syntax("<minimax:tool_call>", _END_OR_JSON, "</minimax:tool_call>"),
    # LM Studio's own format.
    _Syntax("[TOOL_REQUEST]", _END_OR_JSON, "[END_TOOL_REQUEST]"),
    # Llama 3, and Qwen3-Coder.
    _Syntax("<function=", re.compile(r"[\w.-]{1,100}\s*(?:\Z|\{|>\s*(?:\Z|[{<]|[^<]{0,200}</f))"), "</function>"),
    _Syntax("<function name=", _ANYTHING, "</function>"),
    _Syntax("<|python_tag|>", re.compile(r"\s*(?:\Z|\{|[\w.-]{1,100}\s*\(|import\s|from\s)")),
    # Mistral, in both forms: a list of calls, or a name and then its arguments.
    _Syntax("[TOOL_CALLS]", _NAME_AND_MORE),
    # Harmony, the format of gpt-oss.
    _Syntax("<|channel|>commentary", re.compile(r"\s*to\s*="), "<|call|>"),
    _Syntax("to=functions.", re.compile(r"[\w.-]{1,100}\s*(?:\Z|[<{]|code|json)"), "<|call|>"),
    # Claude's format, which MiniMax and others use as well.
    _Syntax("<function_calls>", _END_OR_JSON, "</function_calls>"),
    _Syntax("<invoke name=", _ANYTHING, "</invoke>"),
    # DeepSeek, Kimi, Granite and Phi, Gemma, and Functionary.
    _Syntax("<\uff5ctool\u2581calls\u2581begin\uff5c>", _ANYTHING, "<\uff5ctool\u2581calls\u2581end\uff5c>"),
    _Syntax("<|tool_calls_section_begin|>", _ANYTHING, "<|tool_calls_section_end|>"),
    _Syntax("<|tool_call|>", _END_OR_JSON, "<|/tool_call|>"),
    _Syntax("<|tool_call>", _ANYTHING, "<tool_call|>"),
    _Syntax("<start_function_call>", _ANYTHING, "<end_function_call>"),
    _Syntax("```tool_code", re.compile(r"\s"), "```"),
    _Syntax("```tool_call", re.compile(r"\s"), "```"),
    _Syntax("functools[", re.compile(r"\s*\{")),
)
_JSON: Final = re.compile(r"\s*[\[{]")
_WORD: Final = re.compile(r"[^\W_]")
_PYTHONIC: Final = re.compile(r"^[ \t]*\[\s*([\w.-]{1,100})\(", re.MULTILINE)
_REACT: Final = re.compile(r"Action:[ \t]*([\w.-]{1,100})\s*\Z")
_NAME_KEYS: Final = ('"name"', '"tool"', '"tool_name"', '"function"', '"action"')
"""Keys under which models write the name of a tool in a JSON object."""
_BRACE: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|[{}]')
"""Finds the braces of JSON, and skips those in its texts."""
_CHARACTERS_BEFORE_NAME: Final = 20_000
"""How many characters before the name of a tool are searched for the beginning of its object."""
_JSON_NAME: Final = re.compile(r'"\w+"\s*:\s*"([^"\\]{1,100})"')
_ARGUMENTS: Final = re.compile(r'"(?:arguments|parameters|args|(?:tool_|action_)?input)"\s*:')

_decode_at: Final = json.JSONDecoder().raw_decode


def describe_markup(text: str, tool_names: Collection[str]) -> str | None:
    """Returns what is wrong with an answer that ends in markup which is not meant for its reader, or None.

    Args:
        text: The answer.
        tool_names: The names of the tools. Some syntaxes are those of ordinary texts, unless they name a tool.
    """
    text = text[-_EXAMINED_CHARACTERS:]
    answer = without_template_tokens(text)
    opening = find_unread_call(text, tool_names)
    if opening is not None:
        return f"the answer ends in a tool call that could not be read ({opening})"
    if len(answer) < len(text.rstrip()):
        return "the answer ends in tokens of the model's chat template"
    return None


def find_unread_call(text: str, tool_names: Collection[str]) -> str | None:
    """Returns the words with which the call begins that an answer ends in, or None.

    Args:
        text: The answer.
        tool_names: The names of the tools. Some syntaxes are those of ordinary texts, unless they name a tool.
    """
    text = without_template_tokens(text[-_EXAMINED_CHARACTERS:])
    for syntax in _UNREAD_SYNTAXES:
        for position in _last_mentions(text, syntax.opening):
            content = position + len(syntax.opening)
            if syntax.content.match(text, content) and _is_last(text, content, syntax.closing):
                return syntax.opening
    return _plain_call(text, tool_names) if tool_names else None


def _last_mentions(text: str, words: str) -> Iterator[int]:
    position = len(text)
    for _ in range(_MOST_MENTIONS):
        position = text.rfind(words, 0, position)
        if position < 0:
            return
        yield position


def _is_last(text: str, content: int, closing: str) -> bool:
    """Returns whether a call goes on to the end of the text, apart from punctuation. Otherwise it is a quotation."""
    if closing and (end := text.rfind(closing, content)) >= 0:
        return not _WORD.search(_without_closing_tags(text[end + len(closing) :]))
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
    """Returns what a call looks like that has no tags but names a tool: JSON, Python's syntax, or ReAct's."""
    for position in (each for key in _NAME_KEYS for each in _last_mentions(text, key)):
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
    """Returns where the JSON objects begin that a position is in, the innermost first."""
    objects: list[int] = []
    for each in _BRACE.finditer(text, max(0, position - _CHARACTERS_BEFORE_NAME), position):
        if each[0] == "{":
            objects.append(each.start())
        elif each[0] == "}" and objects:
            objects.pop()
    return objects[::-1]


def _are_last(text: str, objects: Sequence[int]) -> bool:
    """Returns whether the innermost object, or an object around it, goes on to the end of the text."""
    if _is_last(text, objects[0], ""):
        return True
    for begin in objects[1:3]:
        try:
            _, end = _decode_at(text, begin)
        except (ValueError, RecursionError):
            return False
        if not _WORD.search(_without_closing_tags(text[end:])):
            return True
    return False
