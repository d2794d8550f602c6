"""Chunks folded into the reply that the plain call would have returned."""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from lmbridge._text import shorten
from lmbridge.errors import LLMStreamError

if TYPE_CHECKING:
    from lmbridge.types import ChatCompletion

_TEXTS: Final = frozenset({"reasoning_content", "reasoning", "refusal"})
_USUAL: Final = frozenset({"index", "delta", "finish_reason"})
"""What a choice of a chunk holds in any case."""
_JSON_SPACE: Final = " \t\r\n"
_SHOWN_CHARACTERS: Final = 200
"""Characters of a malformed chunk that the error shows."""


class Fold:
    """A reply so far.

    Chunks are added as they arrive; what they held is kept as text, not as chunks.

    Args:
        answers: How many choices there are to be.

    Attributes:
        begun: Whether there was any chunk.
        has_delta: Whether any chunk added anything to a message, be it only its role.
    """

    # Slots, here and wherever there is one of a kind for each open stream: a thousand may be open.
    __slots__ = ("_answers", "_choices", "_content", "_head", "_usage", "_width", "begun", "has_delta")

    def __init__(self, answers: int = 1) -> None:
        self._answers = answers
        self.has_delta = False
        self.begun = False
        self._width = -1  # number of fields of a chunk that may go the short way: those of the one before
        self._head: dict[str, Any] = {}
        self._usage: Any = None
        self._choices: dict[int, _Choice] = {}
        self._content = io.StringIO()  # of choice 0, for the short way of `add`

    @property
    def finished(self) -> bool:
        """Whether all answers, and every one that began beyond them, have their finish reason."""
        return len(self._choices) >= self._answers and all(
            choice.finish_reason is not None for choice in self._choices.values()
        )

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Adds a chunk.

        Raises:
            LLMStreamError: it is no chat completion chunk.
        """
        # The short way: more text, or more arguments, in a chunk with the fields of the one before. Nearly all are.
        try:
            (choice,) = chunk["choices"]
            delta = choice["delta"]
            short = (
                len(delta) == 1
                and len(chunk) == self._width
                and not chunk.get("usage")  # some servers tell it in each chunk, or begin to in the middle
                and choice["finish_reason"] is None
                and choice["index"] == 0
                and (choice["logprobs"] is None if len(choice) == 4 else len(choice) == 3)
            )
            text = delta.get("content")
        except (AttributeError, KeyError, TypeError, ValueError):
            short, text, delta = False, None, {}
        if short and type(text) is str:
            self.has_delta = True
            self._content.write(text)
            return
        if short and self._choices[0].extend(delta.get("tool_calls")):
            return
        try:
            self._add(chunk)
        except (AttributeError, TypeError, ValueError) as exc:
            raise LLMStreamError(
                f"the stream holds a chunk of an unknown shape: {shorten(repr(chunk), _SHOWN_CHARACTERS)}", exc
            ) from exc

    def _add(self, chunk: Mapping[str, Any]) -> None:
        self.begun = True
        head, values = self._head, chunk.values()
        if None in values or "" in values:
            head.update({key: value for key, value in chunk.items() if value not in (None, "") or key not in head})
        else:
            head.update(chunk)
        head["choices"] = None  # they are kept elsewhere
        self._usage = chunk.get("usage") or self._usage
        for part in chunk.get("choices") or ():
            index = part.get("index") or 0
            choice = self._choices.get(index)
            if choice is None:
                if not isinstance(index, int):
                    raise TypeError("an index is no number")
                choice = self._choices[index] = _Choice(self._content if index == 0 else io.StringIO())
            self.has_delta |= choice.add(part)
        # The short way makes no choice, and is for chunks that look like the one before.
        self._width = len(chunk) if 0 in self._choices and not chunk.get("usage") else -1

    def reply(self) -> ChatCompletion:
        """The reply so far, as a new dict. Usage that no chunk told is None."""
        choices = [choice.reply(index) for index, choice in sorted(self._choices.items())]
        reply = {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage}
        return cast("ChatCompletion", reply)


class TextFold(Fold):
    """A text completion so far: a chat completion whose content is called text, and is no message's."""

    __slots__ = ()

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Adds a chunk.

        Raises:
            LLMStreamError: it is no text completion chunk.
        """
        try:
            choices = [_as_delta(choice) for choice in chunk.get("choices") or ()]
        except (AttributeError, TypeError, ValueError) as exc:
            raise LLMStreamError(
                f"the stream holds a chunk of an unknown shape: {shorten(repr(chunk), _SHOWN_CHARACTERS)}", exc
            ) from exc
        super().add({**chunk, "choices": choices})

    def reply(self) -> Any:
        """The reply so far, as a new dict. Usage that no chunk told is None."""
        reply: dict[str, Any] = {**super().reply(), "object": "text_completion"}
        reply["choices"] = [
            {"text": choice.pop("message")["content"], "logprobs": None, **choice} for choice in reply["choices"]
        ]
        return reply


def _as_delta(choice: Mapping[str, Any]) -> dict[str, Any]:
    part = dict(choice)
    part["delta"] = {"content": part.pop("text")} if "text" in part else {}
    return part


def fold_for(chunk: object) -> Fold:
    """The fold for the stream that begins with this chunk."""
    try:
        is_text = chunk["object"] == "text_completion" or "text" in chunk["choices"][0]  # type: ignore[index]  # whatever it is
    except (KeyError, TypeError, IndexError):
        is_text = False
    return TextFold() if is_text else Fold()


class _Choice:
    """One of the answers."""

    __slots__ = ("_calls", "_content", "_function", "_other", "_outer", "_role", "_texts", "finish_reason")

    def __init__(self, content: io.StringIO) -> None:
        self.finish_reason: str | None = None
        self._role = "assistant"
        self._content = content
        # What most answers do not have is made when it comes.
        self._texts: dict[str, io.StringIO] | None = None
        self._other: dict[str, Any] | None = None  # of the message
        self._outer: dict[str, Any] | None = None  # of the choice
        self._calls: ToolCalls | None = None
        self._function: _Call | None = None  # `function_call`, which came before tool calls

    def extend(self, pieces: Any) -> bool:
        """Adds pieces of calls that are more arguments of the last one, and tells whether they were."""
        return self._calls is not None and self._calls.extend(pieces)

    def add(self, part: Mapping[str, Any]) -> bool:
        """Adds a chunk's choice; tells whether it held any delta."""
        delta = part.get("delta") or {}
        for key, value in delta.items():
            if value is None:
                continue
            if key == "content":
                self._content.write(value)
            elif key == "role":
                self._role = value or self._role
            elif key in _TEXTS:
                self._texts = self._texts or {}
                self._texts.setdefault(key, io.StringIO()).write(value)
            elif key == "tool_calls":
                self._calls = self._calls or ToolCalls()
                for piece in value:
                    self._calls.add(piece)
            elif key == "function_call":
                self._function = self._function or _Call(None, None)
                self._function.add({}, None, value.get("name"), value.get("arguments"))
            else:
                self._other = self._other or {}
                _join(self._other, key, value)
        self.finish_reason = part.get("finish_reason") or self.finish_reason
        if not part.keys() <= _USUAL:
            for key, value in part.items():
                if key not in _USUAL and value is not None:
                    self._outer = self._outer or {}
                    _join(self._outer, key, value)
        return bool(delta)

    def reply(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self._role, "content": self._content.getvalue()}
        if self._texts is not None:
            message |= {key: text.getvalue() for key, text in self._texts.items()}
        if self._other is not None:
            message |= _copied(self._other)
        if self._calls is not None and (calls := self._calls.calls()):
            message["tool_calls"] = calls
        if self._function is not None:
            message["function_call"] = self._function.reply()["function"]
        choice = {"index": index, "message": message, "finish_reason": self.finish_reason}
        return choice if self._outer is None else choice | _copied(self._outer)


class ToolCalls:
    """Tool calls, put together from the pieces that servers send.

    A piece belongs to the call with its id; without an id, to the one with its index; without either, to the last.
    Servers break each of these rules: no ids (Ollama), index 0 for every call, no index, the name in every piece
    (llama-cpp-python), arguments as an object, all in one piece. So a new id begins a new call whatever its index,
    and so does, without an id, a name for a call whose arguments are complete or that has another name.
    """

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def extend(self, pieces: Any) -> bool:
        """Adds a delta's `tool_calls` that are nothing but more arguments of the last call; tells whether they were."""
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
        call = self._find(call_id, index, name)
        if call is None:
            call = _Call(call_id, index)
            self._calls.append(call)
        call.add(piece, call_id, name, function.get("arguments"))

    def calls(self) -> list[dict[str, Any]]:
        """The calls so far, in the order in which they began; missing ids are made up."""
        return [call.reply() for call in self._calls]

    def _find(self, call_id: str | None, index: int | None, name: str | None) -> _Call | None:
        if not self._calls:
            return None
        if call_id is not None:
            same = next((call for call in self._calls if call.id == call_id), None)
            if same is not None:
                return same
        found: _Call | None
        if index is None:
            found = self._calls[-1]
        else:
            found = next((call for call in reversed(self._calls) if call.index == index), None)
        if found is None and call_id is None and name is None:
            return self._calls[-1]  # what brings neither an id nor a name does not begin a call
        if found is None or (call_id is not None and found.id is not None):
            return None
        return None if name is not None and found.is_complete_before(name) else found


class _Call:
    def __init__(self, call_id: str | None, index: int | None) -> None:
        self.id = call_id
        self.index = index
        self._name = ""
        self.arguments = io.StringIO()
        self._made_up = ""
        self._other: dict[str, Any] = {}

    def add(self, piece: Mapping[str, Any], call_id: str | None, name: str | None, arguments: Any) -> None:
        self.id = self.id or call_id
        for key, value in piece.items():
            if key not in ("id", "index", "type", "function") and value is not None:
                _join(self._other, key, value)
        if name is not None and name != self._name:  # a name that comes again with every piece is one name
            self._name += name
        if isinstance(arguments, str):
            self.arguments.write(arguments)
        elif arguments is not None:
            self.arguments.write(msgspec.json.encode(arguments).decode())

    def is_complete_before(self, name: str) -> bool:
        """Whether a name that comes without an id of its own is that of another call.

        It is if this one has arguments that are JSON to their end, or, where the server gives no ids, another name.
        """
        if not self._name:
            return False
        if self.id is None and name != self._name:
            return True
        text = self.arguments.getvalue().strip(_JSON_SPACE)
        try:
            msgspec.json.decode(text)
        except msgspec.DecodeError:
            return False
        return True

    def reply(self) -> dict[str, Any]:
        if self.id is None and not self._made_up:
            self._made_up = f"call_{uuid.uuid4().hex[:24]}"
        return {
            "id": self.id or self._made_up,
            "type": "function",
            "function": {"name": self._name, "arguments": self.arguments.getvalue()},
            **_copied(self._other),
        }


def _join(fields: dict[str, Any], key: str, new: Any) -> None:
    """Adds to a field that is not known: lists grow, dicts of lists (`logprobs`) too, anything else is replaced.

    The lists and dicts that grow are the fold's own, never those of a chunk.
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
            _join(old, inner, value)
    elif new is not None or key not in fields:
        fields[key] = new


def _copied(fields: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = {}
    for key, value in fields.items():
        _join(copied, key, value)
    return copied
