"""The conversation of a run: valid at every moment, and cut to what fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import msgspec

from lmbridge.client.inputs import CheckedMessages, check_messages
from lmbridge.client.json_codec import encode_body
from lmbridge.errors import LLMValidationError

Message = dict[str, Any]

_PENDING: Final = "No result: the tool is still running."
_NOT_BEGUN: Final = "Not called: the run ended before."
_INTERRUPTED: Final = (
    "No result: the run ended while the tool was running. It may still be running, and it may or may not have had"
    " its effect."
)
_IMAGE_BYTES: Final = 3_000  # as much as a thousand tokens of text: what most models make of an image, at most
_LONGEST_NAME: Final = 64
"""Characters of the name in a call: no tool has a longer one, but a model may make one up, to be sent each time."""
_PAIRS: Final = "each call of an assistant message must be answered by a message with role 'tool' right behind it"


@attrs.define
class Turn:
    """An assistant message whose calls are being made."""

    message: Message
    results: dict[str, str | None]
    """The calls' ids; what is known of each."""
    begun: set[str] = attrs.field(factory=set)

    def begin(self, call_id: str) -> None:
        """Notes that a call is being made."""
        self.begun.add(call_id)

    def answer(self, call_id: str, text: str) -> None:
        """Adds the result of a call."""
        self.results[call_id] = text

    def as_messages(self, *, ended: bool) -> Iterator[Message]:
        """The message and its results; those that are missing are told as such."""
        yield self.message
        for call_id, result in self.results.items():
            yield _result(call_id, self._missing(call_id, ended=ended) if result is None else result)

    def _missing(self, call_id: str, *, ended: bool) -> str:
        if not ended:
            return _PENDING
        return _INTERRUPTED if call_id in self.begun else _NOT_BEGUN


class History:
    """The messages of a run, those before it included.

    What is sent may leave out what came long ago; what is told to the user never does.

    Args:
        task: The content of the user message that the run begins with.
        system_prompt: The leading system message. It replaces those in `messages`, which are otherwise made one.
        messages: The conversation before.

    Raises:
        LLMValidationError: the messages are no valid conversation, or the task cannot be sent.
    """

    def __init__(
        self,
        task: str | list[Any],
        *,
        system_prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        task = msgspec.json.decode(encode_body({"task": task}))["task"]
        system, before = _read(messages) if messages else ("", [])
        system = system if system_prompt is None else system_prompt
        self._head: list[Message] = [{"role": "system", "content": system}] if system else []
        self._body = before
        # Groups of messages that are left out together, oldest first; those before the task, and those after it.
        self._before = _exchanges(before)
        if before and before[-1]["role"] == "user":  # many templates refuse two user messages in a row
            self._task = {"role": "user", "content": _joined(before.pop()["content"], task)}
            self._before[-1].pop()
        else:
            self._task = {"role": "user", "content": task}
        before.append(self._task)
        self._after: list[list[Message]] = []
        self._turn: Turn | None = None
        self._sent: CheckedMessages | None = None  # until something else than its end changes
        self.size = sum(map(size_of, (*self._head, *before)))

    def tell(self, note: str) -> None:
        """Adds to the leading system message."""
        if not note:
            return
        self._sent = None
        self.size -= sum(map(size_of, self._head))
        content = "\n\n".join([*(message["content"] for message in self._head), note])
        self._head = [{"role": "system", "content": content}]
        self.size += size_of(self._head[0])

    def sent(self) -> CheckedMessages:
        """The messages to send: a new list of the same dicts, which nobody changes."""
        if self._sent is None:
            groups = (self._head, *self._before, [self._task], *self._after)
            self._sent = CheckedMessages(message for group in groups for message in group)
        return CheckedMessages(self._sent)

    def snapshot(self, *, ended: bool) -> list[Message]:
        """A copy of the whole conversation, valid whatever is going on.

        Args:
            ended: Whether no result is going to come any more.
        """
        turn = [] if self._turn is None else self._turn.as_messages(ended=ended)
        return _copied([*self._head, *self._body, *turn])  # type: ignore[no-any-return]  # as it goes in

    def answer(self, text: str) -> None:
        """Adds what the model answered."""
        self._append([{"role": "assistant", "content": text}])

    def begin_turn(self, text: str, calls: Iterable[Mapping[str, Any]]) -> Turn:
        """Adds what the model said and the calls that it asked for, which are open until `end_turn`."""
        wire = [_call(call) for call in calls]
        message = {"role": "assistant", "content": text, "tool_calls": wire}
        self._turn = Turn(message, {call["id"]: None for call in wire})
        return self._turn

    def end_turn(self) -> None:
        """Closes the turn: what has no result will not get one any more."""
        turn, self._turn = self._turn, None
        if turn is not None:
            self._append(list(turn.as_messages(ended=True)))

    def trim(self, excess: int) -> bool:
        """Leaves out the oldest exchanges and turns, whole ones; the task and the last turn stay.

        Args:
            excess: How much is to go, as `size` counts.

        Returns:
            Whether anything was left out.
        """
        goal, before = self.size - excess, self.size
        while self.size > goal and self._before:
            self._drop(self._before.pop(0))
        while self.size > goal and len(self._after) > 1:
            self._drop(self._after.pop(0))
        return self.size < before

    def _append(self, messages: list[Message]) -> None:
        self._body.extend(messages)
        self._after.append(messages)
        if self._sent is not None:
            self._sent += messages
        self.size += sum(map(size_of, messages))

    def _drop(self, messages: list[Message]) -> None:
        self._sent = None
        self.size -= sum(map(size_of, messages))


def size_of(message: Mapping[str, Any]) -> int:
    """Bytes that a message takes as JSON, an image counted as so much text."""
    content = message.get("content")
    if isinstance(content, list):
        return sum(_IMAGE_BYTES if part.get("type") == "image_url" else len(_encode(part)) for part in content)
    return len(_encode(message))


_encode: Final = msgspec.json.Encoder().encode


def arguments_of(text: object) -> str:
    """The arguments of a call, if they are a JSON object; "{}" otherwise."""
    try:
        known = isinstance(text, str) and isinstance(msgspec.json.decode(text), dict)
    except (ValueError, RecursionError):
        known = False
    return str(text) if known else "{}"


def _call(call: Mapping[str, Any]) -> Message:
    """A call as it may be sent again: malformed arguments make llama.cpp answer 500 for ever (#25510)."""
    function = call["function"]
    arguments = arguments_of(function["arguments"])
    name = function["name"][:_LONGEST_NAME] or "unknown"
    return {"id": str(call["id"]), "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(call_id: str, text: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


# What came before


def _copied(value: Any) -> Any:
    """A deep copy, by JSON."""
    return msgspec.json.decode(_encode(value))


def _read(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Message]]:
    """The system's text, and the other messages as copies in the shape that all servers take."""
    check_messages(messages)
    read: list[Message] = msgspec.json.decode(encode_body({"messages": messages}))["messages"]
    system = [_text_of(each) for each in read if each["role"] in ("system", "developer")]
    others = [_normal(each, number) for number, each in enumerate(read) if each["role"] not in ("system", "developer")]
    check_pairs(others)
    return "\n\n".join(filter(None, system)), others


def _normal(message: Message, number: int) -> Message:
    message["content"] = "" if message.get("content") is None else message["content"]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        return message
    try:
        message["tool_calls"] = [_normal_call(call) for call in message["tool_calls"]]
    except (KeyError, TypeError, ValueError) as exc:
        raise LLMValidationError(
            f"messages[{number}] holds a tool call without an id, a name, or arguments that are a JSON object",
            exc,
            hint="leave it and its result out",
        ) from exc
    return message


def _normal_call(call: Mapping[str, Any]) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, dict):
        arguments = _encode(arguments).decode()
    if not isinstance(msgspec.json.decode(arguments), dict) or not function["name"] or not call["id"]:
        raise ValueError("no call")
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def check_pairs(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that every call is answered, once, and right behind it.

    Raises:
        LLMValidationError: one is not, or there is an answer to nothing.
    """
    pending: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            if message.get("tool_call_id") not in pending:
                raise LLMValidationError(
                    f"messages hold a result of {message.get('tool_call_id')!r}, which is no call before it",
                    hint=_PAIRS,
                )
            pending.remove(message["tool_call_id"])
        elif pending:
            break
        else:
            pending = [call["id"] for call in message.get("tool_calls") or ()]
    if pending:
        raise LLMValidationError(f"messages hold the call {pending[0]!r} without a result", hint=_PAIRS)


def _exchanges(messages: list[Message]) -> list[list[Message]]:
    """The messages in groups that each begin with a user's."""
    groups: list[list[Message]] = []
    for message in messages:
        if not groups or message["role"] == "user":
            groups.append([])
        groups[-1].append(message)
    return groups


def _joined(before: str | list[Any], task: str | list[Any]) -> str | list[Any]:
    if isinstance(before, str) and isinstance(task, str):
        return f"{before}\n\n{task}"
    return [*_parts(before), *_parts(task)]


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
