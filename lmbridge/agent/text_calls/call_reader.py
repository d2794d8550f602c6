"""`CallReader`: reads the tool calls at a position of a text, in any of the syntaxes of `syntaxes`.

It knows nothing about tools, and nothing about the text around the calls: `finding` decides whether the calls are to
be made. The text is read once from beginning to end, and what is left of it is never copied, so the time is
proportional to its length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from lmbridge.agent.almost_json import read_almost_json
from lmbridge.agent.argument_json import DuplicateKeyError, decode_written_at, write_json
from lmbridge.agent.text_calls.syntaxes import (
    ARGUMENT_KEYS,
    AT_LINE_START,
    CALL_KEYS,
    CLOSING,
    DISCARDED,
    NAME,
    NAME_ALONE,
    NAME_BEFORE_JSON,
    NAME_BEFORE_PARAMETERS,
    OPENING,
    OTHER_CALL_KEYS,
    PARAMETERS,
    SYNTAX_OF,
    CallSyntax,
    begins_line,
)

_SPACE: Final = re.compile(r"\s*")
_LEFT_OVER: Final = re.compile(r"[\s}\]]*")
_PYTHON_CALL: Final = re.compile(rf"\s*(?:print\(\s*)?(?:default_api\.|functions\.)?({NAME})\(\s*")
_PYTHON_KEYWORD: Final = re.compile(r"\s*([A-Za-z_]\w{0,99})\s*=(?!=)\s*")
_LIST_OF_CALLS: Final = re.compile(rf"\[\s*(?={NAME}\()")
_LINES_AROUND_VALUE: Final = re.compile(r"\n?(.*?)\n?", re.DOTALL)
_CDATA: Final = re.compile(r"\s*<!\[CDATA\[(.*)\]\]>\s*", re.DOTALL)
_NEXT_BARE_CALL: Final = re.compile(r"\s*[;,]\s*(?=\{)")
_MOST_NESTED_OPENINGS: Final = 8
"""The largest number of openings that may precede a call, such as `<tool_calls><tool_call>`."""


class UnreadableCallError(ValueError):
    """A text begins like a call, but it cannot be read, or could be read in several ways."""


class TextCall(NamedTuple):
    """A call that was written as text."""

    name: str
    """The name of the tool, as the model wrote it."""
    arguments: str | None
    """The arguments as JSON; None for a call without arguments."""
    is_repaired: bool = False
    """Whether the arguments should have been valid JSON, but were not, and have been repaired."""


class Region(NamedTuple):
    """A part of a text that consists of calls."""

    start: int
    """The position of its first character."""
    end: int
    """The position after its last character."""
    calls: list[TextCall]
    """The calls in the part."""
    is_bare: bool
    """Whether the calls have no tags or other marks of a call, so that they could also be ordinary JSON or code."""


class CallReader:
    """Reads the calls in one text.

    Args:
        text: The text.
        repairs: Whether JSON with small mistakes is read as well.
        may_be_cut: Whether the end of the text may have been cut off.
    """

    def __init__(self, text: str, *, repairs: bool, may_be_cut: bool) -> None:
        self._text = text
        self._repairs = repairs
        self._may_be_cut = may_be_cut
        # The position after what has been read, and whether the JSON that was read last had to be repaired.
        self._position = 0
        self._is_repaired = False

    def read(self, start: int) -> Region | None:
        """Returns the calls that begin at a position, where `OPENING` matches, or None if none begins there.

        Raises:
            UnreadableCallError: A call begins there, but it cannot be read.
        """
        is_bare = self._syntax_at(start) is None
        try:
            calls, end = self._read_bare_calls(start) if is_bare else self._read_calls(start)
        except UnreadableCallError:
            raise
        except (ValueError, RecursionError) as exc:
            raise UnreadableCallError(str(exc)) from exc
        return Region(start, end, calls, is_bare) if calls else None

    def _read_bare_calls(self, start: int) -> tuple[list[TextCall], int]:
        """Returns calls without tags, separated by semicolons or commas if there are several."""
        if _LIST_OF_CALLS.match(self._text, start):
            return self._read_python_list(start), self._position
        calls: list[TextCall] = []
        position = start
        while True:
            self._is_repaired = False
            value = self._decode(position)
            if not _is_bare_call(value):
                return calls, position
            calls += self._calls_in(value, name_as_key=False)
            following = _NEXT_BARE_CALL.match(self._text, self._position)
            if following is None:
                return calls, self._position
            position = following.end()

    def _read_calls(self, start: int) -> tuple[list[TextCall], int]:
        """Returns calls with tags that follow one another directly, and the position after them."""
        calls: list[TextCall] = []
        end = self._position = start
        # The number of openings since the last call, and whether the last call had a closing.
        openings, has_closed = 0, True
        while True:
            self._position = self._skip(self._position)
            syntax = self._syntax_at(self._position)
            content = self._position + len(syntax.opening if syntax is not None else "")
            if syntax is not None and not syntax.content.match(self._text, content):
                break
            if syntax is not None and syntax.heading is None:
                openings += 1
                if openings > _MOST_NESTED_OPENINGS:
                    raise UnreadableCallError("too many openings one after the other")
                self._position = self._discard(content)
                continue
            if syntax is not None and syntax.heading is not None:
                self._position = content
                found = [self._read_headed(syntax.heading)]
            elif openings:
                found = self._read_body()
            elif not has_closed and self._text.startswith("{", self._position):
                found = self._read_again(calls)
            else:
                break
            calls += found
            end = self._close()
            openings, has_closed = 0, end > self._position
            self._position = end
        if openings:
            raise UnreadableCallError("an opening is not followed by a call")
        return calls, end

    def _syntax_at(self, position: int) -> CallSyntax | None:
        match = OPENING.match(self._text, position)
        syntax = None if match is None else SYNTAX_OF.get(match[0])
        if syntax is not None and syntax.opening in AT_LINE_START and not begins_line(self._text, position):
            return None
        return syntax

    def _skip(self, position: int) -> int:
        space = _SPACE.match(self._text, position)
        return position if space is None else space.end()

    def _discard(self, position: int) -> int:
        while (discarded := DISCARDED.match(self._text, position)) is not None:
            position = discarded.end()
        return position

    def _close(self) -> int:
        """Returns the position after all the closings that follow the last call."""
        end = self._position
        while (closing := CLOSING.match(self._text, end)) is not None:
            end = closing.end()
        return end

    # The forms of a call. Each of these methods sets `_position` to the end of what it has read.

    def _read_body(self) -> list[TextCall]:
        """Reads the calls after an opening that does not name the tool."""
        text, position = self._text, self._position
        self._is_repaired = False
        if _LIST_OF_CALLS.match(text, position):
            return self._read_python_list(position)
        if text.startswith(("{", "["), position):
            value = self._decode(position)
            self._skip_left_over_brackets()
            return self._calls_in(value, name_as_key=True)
        if (name := NAME_BEFORE_JSON.match(text, position)) is not None:
            return [self._read_named(name[1], name.end(), is_native=name[0].lstrip().startswith("call:"))]
        if (name := NAME_BEFORE_PARAMETERS.match(text, position)) is not None:
            return [TextCall(name[1], self._read_parameters(name.end()))]
        if (name := NAME_ALONE.match(text, position)) is not None:
            self._position = name.end()
            return [TextCall(name[1], None)]
        calls = self._read_python_calls(position)
        if not calls:
            raise UnreadableCallError("an opening is not followed by a call")
        return calls

    def _read_again(self, calls: list[TextCall]) -> list[TextCall]:
        """Reads another object in the same tag: another call, or a repetition of the last one, which is ignored."""
        self._is_repaired = False
        value = self._decode(self._position)
        self._skip_left_over_brackets()
        if calls and write_json(value) == calls[-1].arguments:
            return []
        found = self._calls_in(value, name_as_key=False)
        return [] if calls and found[0][:2] == calls[-1][:2] else found

    def _calls_in(self, value: Any, *, name_as_key: bool) -> list[TextCall]:
        return [TextCall(*each, self._is_repaired) for each in _calls_in(value, name_as_key=name_as_key)]

    def _read_headed(self, heading: re.Pattern[str]) -> TextCall:
        """Reads a call whose opening contains the name of the tool."""
        self._is_repaired = False
        match = heading.match(self._text, self._position)
        if match is None:
            raise UnreadableCallError("an opening does not name a tool")
        position = self._skip(self._discard(match.end()))
        if self._text.startswith("{", position):
            return self._read_named(match[1], position)
        if any(each.opening.match(self._text, position) for each in PARAMETERS):
            return TextCall(match[1], self._read_parameters(position))
        if CLOSING.match(self._text, position) is None:
            raise UnreadableCallError("a call has neither arguments nor a closing")
        self._position = position
        return TextCall(match[1], None)

    def _decode(self, position: int) -> Any:
        """Returns the JSON value at a position, with numbers as they were written."""
        try:
            value, self._position = decode_written_at(self._text, position)
        except DuplicateKeyError:
            raise
        except ValueError:
            if not self._repairs:
                raise
            value, self._position = self._decode_almost_json(position)
            self._is_repaired = True
        return value

    def _decode_almost_json(self, position: int) -> tuple[Any, int]:
        almost = read_almost_json(self._text, position, may_be_cut=self._may_be_cut)
        return decode_written_at(almost.text)[0], almost.end

    def _read_named(self, name: str, position: int, *, is_native: bool = False) -> TextCall:
        """Reads the arguments of a call that follow the name of the tool.

        Args:
            name: The name of the tool.
            position: Where the arguments begin.
            is_native: Whether the syntax has its own notation for arguments, which resembles JSON.
        """
        self._is_repaired = False
        if is_native:
            value, self._position = self._decode_almost_json(position)
            return TextCall(name, write_json(value))
        value = self._decode(position)
        while self._text.startswith("{", again := self._skip(self._position)):
            # Some models and servers write the arguments a second time.
            if self._decode(again) != value:
                raise UnreadableCallError("a call has two different arguments")
        self._skip_left_over_brackets()
        return TextCall(name, write_json(value), self._is_repaired)

    def _skip_left_over_brackets(self) -> None:
        rest = _LEFT_OVER.match(self._text, self._position)
        if rest is not None and rest[0].strip():
            if not self._repairs:
                raise UnreadableCallError("brackets are left over after a call")
            self._position, self._is_repaired = self._position + len(rest[0].rstrip()), True

    def _read_parameters(self, position: int) -> str:
        """Reads parameters that are written one by one, and returns them as JSON."""
        parameters: dict[str, Any] = {}
        while True:
            position = self._skip(position)
            for syntax in PARAMETERS:
                if (opening := syntax.opening.match(self._text, position)) is not None:
                    break
            else:
                break
            end = self._text.find(syntax.closing, opening.end())
            if end < 0:
                raise UnreadableCallError("a parameter has no closing")
            value = self._text[opening.end() : end]
            key = opening["key"].strip()
            read = _read_parameter(value, is_json=bool(opening.groupdict().get("json")))
            if parameters.setdefault(key, read) != read:
                raise UnreadableCallError(f"the parameter {key!r} occurs twice, with different values")
            position = end + len(syntax.closing)
        self._position = position
        if self._may_be_cut and CLOSING.match(self._text, position) is None:
            raise UnreadableCallError("a call may have been cut off between two parameters")
        return write_json(parameters)

    def _read_python_list(self, position: int) -> list[TextCall]:
        calls = self._read_python_calls(position + 1)
        position = self._skip(self._position)
        if not self._text.startswith("]", position):
            raise UnreadableCallError("a list of calls has no closing bracket")
        self._position = position + 1
        return calls

    def _read_python_calls(self, position: int) -> list[TextCall]:
        """Reads calls in the syntax of Python, which are separated by commas, semicolons or line breaks."""
        calls: list[TextCall] = []
        while (name := _PYTHON_CALL.match(self._text, position)) is not None:
            arguments = self._read_keywords(name.end())
            is_printed = "print(" in name[0]
            if is_printed:
                position = self._skip(self._position)
                if not self._text.startswith(")", position):
                    raise UnreadableCallError("print() has no closing parenthesis")
                self._position = position + 1
            calls.append(TextCall(name[1].removesuffix(".call"), arguments))
            position = self._position
            following = self._skip(position)
            if self._text.startswith((",", ";"), following):
                position = following + 1
            elif "\n" not in self._text[position:following]:
                break
        return calls

    def _read_keywords(self, position: int) -> str:
        """Reads keyword arguments up to the closing parenthesis, and returns them as JSON.

        Positional arguments are refused, because the names of their parameters are not known here.
        """
        pieces: list[str] = []
        while True:
            position = self._skip(position)
            if self._text.startswith(")", position):
                self._position = position + 1
                return "{" + ", ".join(pieces) + "}"
            keyword = _PYTHON_KEYWORD.match(self._text, position)
            if keyword is None:
                raise UnreadableCallError("a call has an argument without a name")
            value = read_almost_json(self._text, keyword.end())
            pieces.append(f'"{keyword[1]}": {value.text}')
            position = self._skip(value.end)
            if self._text.startswith(",", position):
                position += 1
            elif not self._text.startswith(")", position):
                raise UnreadableCallError("a call in Python's syntax has no closing parenthesis")


def _read_parameter(value: str, *, is_json: bool) -> Any:
    if (cdata := _CDATA.fullmatch(value)) is not None:
        return cdata[1]
    if is_json:
        try:
            decoded, end = decode_written_at(stripped := value.strip())
        except (ValueError, RecursionError):
            return value
        return decoded if end == len(stripped) else value
    lines = _LINES_AROUND_VALUE.fullmatch(value)
    return value if lines is None else lines[1]


def _calls_in(value: Any, *, name_as_key: bool) -> list[tuple[str, str | None]]:
    """Returns the names and arguments of the calls in a JSON value.

    Args:
        value: A call, a list of calls, or an object whose only key is `tool_calls`, with such a list.
        name_as_key: Whether an object with a single key may be a call of a tool of that name.

    Raises:
        UnreadableCallError: The value is something else, or a list without calls.
    """
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list) and len(value) == 1:
        value = value["tool_calls"]
    entries = value if isinstance(value, list) else [value]
    calls = [_call_in(each, name_as_key=name_as_key) for each in entries]
    if not calls:
        raise UnreadableCallError("a list of calls is empty")
    return calls


def _call_in(value: Any, *, name_as_key: bool) -> tuple[str, str | None]:
    if not isinstance(value, dict):
        raise UnreadableCallError("a call is not an object")
    if isinstance(value.get("function"), dict):
        # The form of OpenAI's API.
        value = value["function"]
    name = next((value[key] for key in CALL_KEYS if isinstance(value.get(key), str)), None)
    if name is None and isinstance(value.get("function"), str):
        name = value["function"]
    if name is not None:
        arguments = arguments_in(value)
        is_text = arguments is None or isinstance(arguments, str)
        return name, arguments if is_text else write_json(arguments)
    if name_as_key and len(value) == 1 and not value.keys() & {*CALL_KEYS, *ARGUMENT_KEYS}:
        ((key, arguments),) = value.items()
        if isinstance(arguments, dict):
            return key, write_json(arguments)
    raise UnreadableCallError("a call names no tool")


def arguments_in(call: Mapping[str, Any]) -> Any:
    """Returns the arguments of a call, or None if it has none.

    A call may have arguments under two keys. If they differ, both are returned as a list, because choosing one of them
    would be a guess. No tool accepts a list, so the model reads that the arguments are wrong.
    """
    given = [call[key] for key in ARGUMENT_KEYS if call.get(key) is not None]
    if not given:
        return None
    return given[0] if given[0] == given[-1] else given


def _is_bare_call(value: Any) -> bool:
    """Returns whether a JSON value without any tags has the keys of a call, or of calls, and no others.

    The definition of a tool has such keys as well, but its `parameters` are a schema.
    """
    if isinstance(value, dict) and value.keys() == {"tool_calls"}:
        value = value["tool_calls"]
    if isinstance(value, list):
        return bool(value) and all(_is_bare_call(each) for each in value)
    if not isinstance(value, dict):
        return False
    if isinstance(function := value.get("function"), dict):
        return value.keys() <= OTHER_CALL_KEYS and _is_bare_call(function)
    if not value.keys() <= {*CALL_KEYS, *ARGUMENT_KEYS, *OTHER_CALL_KEYS}:
        return False
    names = [value[key] for key in (*CALL_KEYS, "function") if isinstance(value.get(key), str)]
    arguments = arguments_in(value)
    is_schema = isinstance(arguments, dict) and isinstance(arguments.get("properties"), dict)
    return len(names) == 1 and arguments is not None and not is_schema
