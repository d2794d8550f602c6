"""Tool calls of a streamed reply, put together from the pieces that servers send."""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from typing import Any, Final

import msgspec

_JSON_WHITESPACE: Final = " \t\r\n"


class ToolCallAccumulator:
    """The tool calls of one answer, as far as their pieces have arrived.

    OpenAI's rule is that each piece carries the index of its call, and the first piece also the id. Servers break it
    in every way: Ollama sends no ids, others number every call 0 or not at all, llama-cpp-python repeats the name in
    each piece, and some send the arguments as an object, all in one piece. A piece is therefore matched by its id
    first, then by its index, and otherwise belongs to the last call. A new id begins a new call whatever the index is.
    Where there is no id, a name begins a new call if the arguments so far are complete or the name is another one.
    """

    # This class and the accumulators that use it have slots because a program may have a thousand streams open.
    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: list[_PartialCall] = []

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
        call_id, index, name = piece.get("id") or None, piece.get("index"), function.get("name") or None
        call = self._find_call(call_id, index, name)
        if call is None:
            call = _PartialCall(call_id, index)
            self._calls.append(call)
        call.add(piece, call_id, name, function.get("arguments"))

    def calls(self) -> list[dict[str, Any]]:
        """Returns the calls so far, in the order in which they began. A call without an id gets a generated one."""
        return [call.as_dict() for call in self._calls]

    def _find_call(self, call_id: str | None, index: int | None, name: str | None) -> _PartialCall | None:
        """Returns the call that a piece belongs to, or None if the piece begins a new call."""
        if not self._calls:
            return None
        if call_id is not None:
            same_id = next((call for call in self._calls if call.id == call_id), None)
            if same_id is not None:
                return same_id
        found: _PartialCall | None
        if index is None:
            found = self._calls[-1]
        else:
            found = next((call for call in reversed(self._calls) if call.index == index), None)
        if found is None and call_id is None and name is None:
            # Without an id and a name, a piece cannot begin a call, whatever its index is.
            return self._calls[-1]
        if found is None or (call_id is not None and found.id is not None):
            return None
        return None if name is not None and found.is_ended_by_name(name) else found


class _PartialCall:
    """One tool call, or the older `function_call`, while its pieces arrive."""

    __slots__ = ("_generated_id", "_name", "_other_fields", "arguments", "id", "index")

    def __init__(self, call_id: str | None, index: int | None) -> None:
        self.id = call_id
        self.index: int | None = index
        self.arguments: io.StringIO = io.StringIO()
        self._name = ""
        self._generated_id = ""
        self._other_fields: dict[str, Any] = {}

    def add(self, piece: Mapping[str, Any], call_id: str | None, name: str | None, arguments: Any) -> None:
        self.id = self.id or call_id
        for key, value in piece.items():
            if key not in ("id", "index", "type", "function") and value is not None:
                merge_field(self._other_fields, key, value)
        # A name that is sent again with every piece is one name, not pieces of a name.
        if name is not None and name != self._name:
            self._name += name
        if isinstance(arguments, str):
            self.arguments.write(arguments)
        elif arguments is not None:
            self.arguments.write(msgspec.json.encode(arguments).decode())

    def is_ended_by_name(self, name: str) -> bool:
        """Returns whether a name that arrives without an id begins a new call, so that this one has ended.

        That is so if the arguments of this call are complete JSON, or if the server sends no ids and this call has
        another name.
        """
        if not self._name:
            return False
        if self.id is None and name != self._name:
            return True
        text = self.arguments.getvalue().strip(_JSON_WHITESPACE)
        try:
            msgspec.json.decode(text)
        except msgspec.DecodeError:
            return False
        return True

    def as_dict(self) -> dict[str, Any]:
        if self.id is None and not self._generated_id:
            self._generated_id = generated_call_id()
        return {"id": self.id or self._generated_id, "type": "function", "function": self.function()} | copy_fields(
            self._other_fields
        )

    def function(self) -> dict[str, Any]:
        return {"name": self._name, "arguments": self.arguments.getvalue()}


class FunctionCallAccumulator(_PartialCall):
    """The `function_call` of a message, which older servers send instead of `tool_calls`."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(None, None)

    def extend(self, piece: Mapping[str, Any]) -> None:
        """Adds what a delta's `function_call` holds."""
        self.add({}, None, piece.get("name"), piece.get("arguments"))


def generated_call_id() -> str:
    """Returns an id for a call that the server sent without one."""
    return f"call_{uuid.uuid4().hex[:24]}"


def merge_field(fields: dict[str, Any], key: str, new: Any) -> None:
    """Merges the value of a field that lmbridge does not know: lists grow, dicts are merged, other values replace.

    The `logprobs` of a choice are such a field: a dict of lists. The lists and dicts in `fields` are always copies, so
    that merging never changes a chunk that the caller holds.
    """
    old = fields.get(key)
    if isinstance(new, list):
        if isinstance(old, list):
            old.extend(new)
        else:
            fields[key] = list(new)
    elif isinstance(new, dict):
        if not isinstance(old, dict):
            old = fields[key] = {}
        for inner, value in new.items():
            merge_field(old, inner, value)
    elif new is not None or key not in fields:
        fields[key] = new


def copy_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of merged fields that later merging does not change."""
    copied: dict[str, Any] = {}
    for key, value in fields.items():
        merge_field(copied, key, value)
    return copied
