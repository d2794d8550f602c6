"""Tool calls of a streamed reply, put together from the pieces that servers send."""

from __future__ import annotations

import io
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from lmbridge._text import join_surrogates, replace_lone_surrogates

_JSON_WHITESPACE: Final = " \t\r\n"
_JSON_MARKS: Final = re.compile(r'\\.|["\\{}\[\]]', re.DOTALL)
"""The characters that decide where a JSON object or array ends, and escaped characters, which do not."""
_DEEPEST_MERGED_FIELD: Final = 20
"""The depth of nested dicts up to which fields are merged. Deeper values replace each other."""
_LONGEST_SCALAR: Final = 100
"""Arguments that are neither an object nor an array count as complete JSON only up to this length."""
_LABELS: Final = frozenset(
    {"id", "index", "type", "name", "role", "object", "model", "format", "status", "phase", "signature", "encoding"}
)
"""The names of fields whose strings are labels, which servers repeat, and not pieces of a text."""
_LABEL_ENDINGS: Final = ("_id", "_type", "_name", "_role", "_model", "_format", "_status", "_reason", "_signature")


class ToolCallAccumulator:
    """The tool calls of one answer, as far as their pieces have arrived.

    OpenAI's rule is that each piece carries the index of its call, and the first piece also the id. Servers break this
    rule in every way: Ollama sends no ids; others give every call the index 0, or no index, or the same id;
    llama-cpp-python repeats the name in each piece; and some servers send all arguments in one piece, as an object.
    Therefore the call that a piece belongs to is found by the id of the piece, else by its index, and else it is the
    last call. A new id begins a new call whatever the index is, and so does a known id with another index or another
    name. In a piece without an id, a name begins a new call if the arguments so far are complete, or if the call so far
    has no id and another name.
    """

    # This class and the accumulators that use it have slots because a program may have a thousand streams open.
    __slots__ = ("_by_id", "_by_index", "_calls")

    def __init__(self) -> None:
        self._calls: list[_PartialCall] = []
        # The newest call for each id, for each pair of an id and an index, and for each pair of an id and a name; and
        # the newest call for each index. Searching all calls for each piece would take seconds for thousands of
        # calls.
        self._by_id: dict[Any, _PartialCall] = {}
        self._by_index: dict[Any, _PartialCall] = {}

    def extend_last(self, pieces: Any) -> bool:
        """Appends arguments to the last call if the pieces hold nothing else.

        This is the fast path for the many small chunks of a long call.

        Args:
            pieces: The `tool_calls` of a delta, which may have any shape.

        Returns:
            Whether the pieces were added. If not, nothing has changed, and `add` has to be called for each of them.
        """
        try:
            (piece,) = pieces
            function = piece["function"]
            arguments = function["arguments"]
            last = self._calls[-1]
            if len(piece) != 2 or len(function) != 1 or type(arguments) is not str or piece["index"] != last.index:
                return False
        except (IndexError, KeyError, TypeError, ValueError):
            return False
        last.arguments.write(arguments)
        return True

    def add(self, piece: Mapping[str, Any]) -> None:
        """Adds one entry of a delta's `tool_calls`."""
        function = piece.get("function") or {}
        call_id, index, name = _id_in(piece), piece.get("index"), function.get("name") or None
        arguments = function.get("arguments")
        call = self._find_call(call_id, index, name, arguments)
        if call is None:
            call = _PartialCall(call_id, index)
            self._calls.append(call)
        call.add(piece, call_id, name, arguments)
        self._register(call)

    def calls(self) -> Iterator[dict[str, Any]]:
        """Yields the calls so far, in the order in which they began. A call without an id gets a generated one."""
        return (call.as_dict() for call in self._calls)

    def _register(self, call: _PartialCall) -> None:
        if call.index is not None:
            self._by_index[call.index] = call
        if call.id is not None:
            self._by_id[call.id] = self._by_id[call.id, "index", call.index] = call
            self._by_id[call.id, "name", call.name] = call

    def _find_call(self, call_id: str | None, index: Any, name: str | None, arguments: Any) -> _PartialCall | None:
        """Returns the call that a piece belongs to, or None if the piece begins a new call."""
        found: _PartialCall | None
        if not self._calls:
            return None
        if call_id is not None and call_id in self._by_id:
            found = self._find_call_with_id(call_id, index, name)
            return None if found is not None and name is not None and found.is_ended_by_object(arguments) else found
        found = self._calls[-1] if index is None else self._by_index.get(index)
        if found is None and call_id is None and name is None:
            # Without an id and a name, a piece cannot begin a call, whatever its index is.
            return self._calls[-1]
        if found is None or (call_id is not None and found.id is not None):
            return None
        return None if name is not None and found.is_ended_by_name(name) else found

    def _find_call_with_id(self, call_id: str, index: Any, name: str | None) -> _PartialCall | None:
        """Returns the call that a piece with a known id belongs to, or None if the piece begins a call with this id."""
        found = self._by_id[call_id]
        if index is not None and found.index is not None and found.index != index:
            # The id is not unique: its newest call has another index. A newest call without an index would match.
            other = self._by_id.get((call_id, "index", index))
            if other is None:
                return None
            found = other
        if name is not None and found.name and found.name != name:
            other = self._by_id.get((call_id, "name", name))
            return other if other is not None and (index is None or other.index == index) else None
        return found


def _id_in(piece: Mapping[str, Any]) -> str | None:
    """Returns the id in a piece, or None.

    Raises:
        TypeError: The id is neither a string nor a number.
    """
    call_id = piece.get("id")
    if type(call_id) is str:
        return call_id or None
    if not isinstance(call_id, str | int | None):
        raise TypeError("the id of a tool call is neither a string nor a number")
    return None if call_id is None or call_id == "" else str(call_id)


class _PartialCall:
    """One tool call, or the older `function_call`, while its pieces arrive."""

    __slots__ = (
        "_end",
        "_generated_id",
        "_other_fields",
        "arguments",
        "id",
        "index",
        "name",
    )

    def __init__(self, call_id: str | None, index: Any) -> None:
        self.id = call_id
        self.index: Any = index
        self.arguments: io.StringIO = io.StringIO()
        self.name: str = ""
        self._generated_id = ""
        self._other_fields: dict[str, Any] = {}
        self._end: _JsonEnd | None = None

    def add(self, piece: Mapping[str, Any], call_id: str | None, name: str | None, arguments: Any) -> None:
        self.id = self.id or call_id
        for key, value in piece.items():
            if key not in ("id", "index", "type", "function") and value is not None:
                merge_field(self._other_fields, key, value)
        # A name that is sent again with every piece is one name, not pieces of a name.
        if name is not None and name != self.name:
            self.name += name
        if isinstance(arguments, str):
            self.arguments.write(arguments)
        elif arguments is not None:
            self.arguments.write(arguments_text(arguments))

    def is_ended_by_name(self, name: str) -> bool:
        """Returns whether a name that arrives without an id begins a new call, so that this call has ended.

        That is so if the arguments of this call are complete JSON, or if the server sends no ids and this call has
        another name.
        """
        if not self.name:
            return False
        return (self.id is None and name != self.name) or self._has_complete_arguments()

    def is_ended_by_object(self, arguments: Any) -> bool:
        """Returns whether arguments that arrive with the id and the name of this call are those of a new call.

        That is so if they begin an object, and the arguments of this call are already complete. An empty piece after
        complete arguments, which some servers send, belongs to this call.
        """
        begins_object = arguments.lstrip(_JSON_WHITESPACE).startswith("{") if isinstance(arguments, str) else arguments
        return bool(begins_object) and self._has_complete_arguments()

    def _has_complete_arguments(self) -> bool:
        self._end = self._end or _JsonEnd()
        return self._end.is_reached(self.arguments)

    def as_dict(self) -> dict[str, Any]:
        if self.id is None and not self._generated_id:
            self._generated_id = generated_call_id()
        call_id = join_surrogates(self.id or self._generated_id)
        call = {"id": call_id, "type": "function", "function": self.function()}
        return call | copy_fields(self._other_fields) if self._other_fields else call

    def function(self) -> dict[str, Any]:
        return {"name": join_surrogates(self.name), "arguments": join_surrogates(self.arguments.getvalue())}


class FunctionCallAccumulator(_PartialCall):
    """The `function_call` of a message, which older servers send instead of `tool_calls`."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(None, None)

    def extend(self, piece: Mapping[str, Any]) -> None:
        """Adds what a delta's `function_call` holds."""
        self.add({}, None, piece.get("name"), piece.get("arguments"))


class _JsonEnd:
    """Finds out whether a growing text is complete JSON, reading each of its characters only once.

    Decoding the whole text after each piece instead would take time that grows with the square of its length.
    """

    __slots__ = ("_depth", "_has_closed", "_is_broken", "_is_in_string", "_read", "_rest")

    def __init__(self) -> None:
        # The number of characters that have been read.
        self._read = 0
        # The number of objects and arrays that are open.
        self._depth = 0
        self._is_in_string = False
        # A backslash at the end of what was read, which belongs to the character after it.
        self._rest = ""
        # Whether the outermost object or array has been closed.
        self._has_closed = False
        # Whether the text is not JSON, whatever follows.
        self._is_broken = False

    def is_reached(self, buffer: io.StringIO) -> bool:
        """Returns whether a text is complete JSON. Each call reads only what was added since the last call."""
        buffer.seek(self._read)
        text = self._rest + buffer.read()
        self._read = buffer.tell()
        self._scan(text)
        if self._is_broken or (not self._has_closed and (self._depth or self._read > _LONGEST_SCALAR)):
            return False
        try:
            msgspec.json.decode(buffer.getvalue().strip(_JSON_WHITESPACE))
        except (ValueError, RecursionError):
            self._is_broken = self._has_closed
            return False
        return True

    def _scan(self, text: str) -> None:
        self._rest = ""
        for mark in _JSON_MARKS.findall(text):
            if mark == "\\":
                self._rest = mark
            elif mark == '"':
                self._is_in_string = not self._is_in_string
            elif not self._is_in_string and len(mark) == 1:
                self._is_broken |= self._has_closed
                self._depth += 1 if mark in "{[" else -1
                self._has_closed |= self._depth <= 0


def arguments_text(arguments: Any) -> str:
    """Returns the JSON text of arguments that a server sent as an object."""
    return msgspec.json.encode(replace_lone_surrogates(arguments)).decode()


def generated_call_id() -> str:
    """Returns an id for a call that the server sent without one."""
    return f"call_{uuid.uuid4().hex[:24]}"


# Fields that lmbridge does not know


def is_label(key: str) -> bool:
    """Returns whether a field has a name like "type" or "item_id", whose values are not pieces of a text."""
    return key in _LABELS or key.endswith(_LABEL_ENDINGS)


def merge_field(fields: dict[str, Any], key: str, new: Any, *, joins_texts: bool = True, depth: int = 0) -> None:
    """Merges the value of a field that lmbridge does not know: lists grow, dicts are merged, others are replaced.

    The `logprobs` of a choice are such a field: a dict of lists. The lists and dicts in `fields` are always copies, so
    that merging never changes a chunk that the caller holds. `copy_fields` returns the result.

    Args:
        fields: The fields so far.
        key: The name of the field.
        new: The value that has arrived.
        joins_texts: Whether strings are pieces of a text, as they are in a delta, unless the field is a label.
        depth: The number of dicts around the field. What is nested too deeply is not merged.
    """
    old = fields.get(key)
    if depth > _DEEPEST_MERGED_FIELD:
        fields[key] = new
    elif isinstance(new, list):
        if isinstance(old, list):
            old.extend(new)
        else:
            fields[key] = list(new)
    elif isinstance(new, dict):
        if not isinstance(old, dict):
            old = fields[key] = {}
        for inner, value in new.items():
            merge_field(old, inner, value, joins_texts=joins_texts, depth=depth + 1)
    elif joins_texts and isinstance(new, str) and not is_label(key):
        if not isinstance(old, io.StringIO):
            old = fields[key] = io.StringIO()
        old.write(new)
    elif new is not None or key not in fields:
        fields[key] = new


def copy_fields(fields: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Returns a copy of merged fields that later merging does not change, with texts as strings."""
    return {key: _copy(value, depth) for key, value in fields.items()}


def _copy(value: Any, depth: int) -> Any:
    if isinstance(value, io.StringIO):
        return join_surrogates(value.getvalue())
    # What is nested more deeply was not merged, and may be nested too deeply for a recursive function.
    if isinstance(value, dict) and depth <= _DEEPEST_MERGED_FIELD:
        return copy_fields(value, depth + 1)
    return list(value) if isinstance(value, list) else value
