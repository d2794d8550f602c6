"""`History`: the conversation of a run, valid at every moment, and trimmed to what fits into the context.

A conversation that a server accepts has rules: one leading system message, a result directly after every call,
arguments that are valid JSON, and no content that is null. A run breaks them for as long as its tools are running, and
a cancelled run would break them for ever. So the assistant message whose calls are being made is kept apart, as a
`Turn`, and joins the conversation only together with all its results; a copy that is taken before that has placeholders
for the missing results. The alternative was to repair the conversation afterwards, which each caller would have had to
do.

The messages to send and the messages that the user sees are two views of one list. Trimming removes messages only from
the former, in whole groups: an exchange before the task, or a turn with its results. The remaining messages never
change, not by a single byte, so that a server can reuse its prompt cache. Summarising old messages was considered and
rejected: it costs a generation, and loses facts without a trace.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import msgspec

from lmbridge._checks import MAPPING_TYPES
from lmbridge.agent.result_images import NOT_SHOWN, ImagePlace, image_messages
from lmbridge.agent.tool_names import LONGEST_NAME
from lmbridge.client.inputs import CheckedList, check_messages
from lmbridge.client.json_codec import encode_body
from lmbridge.errors import LLMValidationError

Message = dict[str, Any]

_STILL_RUNNING_RESULT: Final = "No result: the tool is still running."
_NOT_CALLED_RESULT: Final = "Not called: the run ended first."
_INTERRUPTED_RESULT: Final = (
    "No result: the run ended while the tool was running. It may still be running, and it may or may not have had"
    " its effect."
)
_IMAGE_BYTES: Final = 3_000
"""The size that an image counts as, in bytes. It stands for about 1,000 tokens, which is more than most models use."""
_UNSENDABLE: Final = re.compile(r"[^A-Za-z0-9_-]+")
"""Characters that a name in a call may not have. Servers refuse the whole conversation with such a name, for ever."""
_NAMELESS: Final = "unknown"
"""The name of a call whose own name has no character that may be sent."""
_PAIRS_HINT: Final = (
    "each call of an assistant message must be answered by a message with role 'tool' directly after it"
)


@attrs.define
class Turn:
    """An assistant message whose calls are being made."""

    message: Message
    """The assistant message."""
    results: dict[str, str | None]
    """The results, in order. The keys are the ids of the calls; a call that has no result yet has None."""
    begun: set[str] = attrs.field(factory=set)
    """The ids of the calls that have been started."""
    images: dict[str, Sequence[Mapping[str, Any]]] = attrs.field(factory=dict)
    """The images of the results, as content parts. The keys are the ids of the calls."""

    def begin(self, call_id: str) -> None:
        """Records that a call has been started."""
        self.begun.add(call_id)

    def answer(self, call_id: str, text: str, images: Sequence[Mapping[str, Any]] = ()) -> None:
        """Adds the result of a call, and its images as content parts."""
        self.results[call_id] = text
        if images:
            self.images[call_id] = images

    def as_messages(self, *, ended: bool, image_place: ImagePlace = "user") -> Iterator[Message]:
        """Yields the message, its results, with placeholders for results that are missing, and their images."""
        yield self.message
        for call_id, result in self.results.items():
            text = self._placeholder(call_id, ended=ended) if result is None else result
            images = self.images.get(call_id, ())
            if images and image_place == "tool":
                yield _result_message(call_id, [{"type": "text", "text": text}, *images])
            else:
                yield _result_message(call_id, f"{text}\n{NOT_SHOWN}" if images and image_place == "none" else text)
        if image_place == "user":
            names = [call["function"]["name"] for call in self.message["tool_calls"]]
            yield from image_messages(names, [self.images.get(call_id, ()) for call_id in self.results])

    def _placeholder(self, call_id: str, *, ended: bool) -> str:
        if not ended:
            return _STILL_RUNNING_RESULT
        return _INTERRUPTED_RESULT if call_id in self.begun else _NOT_CALLED_RESULT


class History:
    """The messages of a run, including those of the conversation that it continues.

    Args:
        task: The content of the user message that the run begins with.
        system_prompt: The leading system message. It replaces the system messages in `messages`, which are otherwise
            joined into one.
        messages: The conversation that the run continues. Default: none.

    Raises:
        LLMValidationError: The messages are not a valid conversation, or the task cannot be sent.

    Attributes:
        size: The bytes of the messages to send; see `size_of`.
        image_place: Where the images of results are put. Default: "user".
    """

    def __init__(
        self,
        task: str | list[Any],
        *,
        system_prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        # Encoding and decoding turns subclasses of str into plain strings, and refuses what JSON does not have.
        given = msgspec.json.decode(encode_body({"task": task, "system_prompt": system_prompt}))
        task, system_prompt = given["task"], given["system_prompt"]
        system, before = _read_messages(messages) if messages else ("", [])
        system = system if system_prompt is None else system_prompt
        self._head: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = before
        # Groups of messages that trimming leaves out together, oldest first: those before the task, and those after it.
        self._groups_before_task = _group_by_user_message(before)
        if before and before[-1]["role"] == "user":
            # Many chat templates refuse two user messages in a row.
            self._task = {"role": "user", "content": _join_contents(before.pop()["content"], task)}
            self._groups_before_task[-1].pop()
        else:
            self._task = {"role": "user", "content": task}
        before.append(self._task)
        self._groups_after_task: list[list[Message]] = []
        self._turn: Turn | None = None
        self.image_place: ImagePlace = "user"
        self._turn_with_images: Turn | None = None
        # The reasoning of the model's messages, by their place in `_messages`, as the fields that send it back.
        self._reasoning: dict[int, Mapping[str, str]] = {}
        self._sends_reasoning = False
        self._demanded_field: str | None = None
        self._nudges: list[Message] = []
        # The messages to send, without the nudges. Appending extends this list; any other change makes it None, so that
        # it is built again.
        self._to_send: CheckedList | None = None
        self.size: int = sum(map(size_of, (*self._head, *before)))

    def add_system_note(self, note: str) -> None:
        """Appends a text to the leading system message; an empty one changes nothing."""
        if not note:
            return
        self._to_send = None
        self.size -= sum(map(size_of, self._head))
        content = "\n\n".join([*(message["content"] for message in self._head), note])
        self._head = [{"role": "system", "content": content}]
        self.size += size_of(self._head[0])

    def to_send(self) -> CheckedList:
        """Returns the messages of the next request: a new list of the same dicts, which must not be changed."""
        if self._to_send is None:
            groups = (self._head, *self._groups_before_task, [self._task], *self._groups_after_task)
            self._to_send = CheckedList(message for group in groups for message in group)
        messages = CheckedList(self._to_send)
        messages += self._nudges
        return messages

    def snapshot(self, *, ended: bool) -> list[Message]:
        """Returns a copy of the whole conversation, which is valid at any moment.

        Args:
            ended: True if the run has ended, so that the missing results will never arrive.
        """
        turn = [] if self._turn is None else self._turn.as_messages(ended=ended, image_place=self.image_place)
        copied: list[Message] = _deep_copy([*self._head, *self._messages, *turn])
        return copied

    def send_reasoning(self, demanded_field: str | None = None) -> bool:
        """Makes the model's reasoning a part of its messages, of those before and of those to come.

        Args:
            demanded_field: The field that the server demands. Each message of the model then has it, and an empty one
                if its reasoning is unknown. By default, the fields are those in which the server sent the reasoning.

        Returns:
            Whether any message has changed.
        """
        self._sends_reasoning, self._demanded_field = True, demanded_field
        changed = {
            id(message): self._with_reasoning(message, self._reasoning.get(place, {}))
            for place, message in enumerate(self._messages)
            if message["role"] == "assistant"
        }
        old, self._messages = self._messages, [changed.get(id(message), message) for message in self._messages]
        for group in (*self._groups_before_task, *self._groups_after_task):
            group[:] = [changed.get(id(message), message) for message in group]
        self._to_send = None
        self.size = sum(map(size_of, self.to_send()))
        return old != self._messages

    def _with_reasoning(self, message: Message, reasoning: Mapping[str, str]) -> Message:
        if not self._sends_reasoning:
            return message
        if self._demanded_field is not None and self._demanded_field not in message:
            reasoning = {self._demanded_field: "".join(reasoning.values())}
        return {**message, **reasoning}

    def add_answer(
        self, text: str, *, reasoning: Mapping[str, str] | None = None, follow_up: str | None = None
    ) -> None:
        """Adds an answer of the model.

        Args:
            text: The answer.
            reasoning: The fields that send the reasoning back; they become a part of the message if it is to be sent.
            follow_up: A user message that asks for another answer. Default: none.
        """
        self._reasoning[len(self._messages)] = reasoning or {}
        answer = self._with_reasoning({"role": "assistant", "content": text}, reasoning or {})
        self._append([answer] if follow_up is None else [answer, {"role": "user", "content": follow_up}])

    def add_nudge(self, reply: str, nudge: str, *, reasoning: Mapping[str, str] | None = None) -> None:
        """Adds a flawed reply and what the model is told about it to the messages to send, until `drop_nudges`.

        Args:
            reply: The text of the reply, which must not be empty.
            nudge: The text for the model.
            reasoning: The fields that send the reasoning back; they become a part of the message if it is to be sent.
        """
        answer = self._with_reasoning({"role": "assistant", "content": reply}, reasoning or {})
        added = [answer, {"role": "user", "content": nudge}]
        self._nudges += added
        self.size += sum(map(size_of, added))

    def drop_nudges(self) -> None:
        """Leaves out what `add_nudge` has added."""
        self.size -= sum(map(size_of, self._nudges))
        self._nudges = []

    def begin_turn(
        self, text: str, calls: Iterable[Mapping[str, Any]], *, reasoning: Mapping[str, str] | None = None
    ) -> Turn:
        """Begins a turn with a reply that contains calls. `end_turn` adds it to the conversation.

        Args:
            text: The text of the reply.
            calls: Its calls, each with a unique id. A name that servers refuse is replaced by one that resembles
                it, and arguments that are not an object by an empty one.
            reasoning: The fields that send the reasoning back; they become a part of the message if it is to be sent.
        """
        wire = [_resendable_call(call) for call in calls]
        self._reasoning[len(self._messages)] = reasoning or {}
        message = self._with_reasoning({"role": "assistant", "content": text, "tool_calls": wire}, reasoning or {})
        self._turn = Turn(message, {call["id"]: None for call in wire})
        return self._turn

    def end_turn(self) -> None:
        """Adds the turn to the conversation. Calls without a result keep a placeholder."""
        turn, self._turn = self._turn, None
        if turn is not None:
            self._append(list(turn.as_messages(ended=True, image_place=self.image_place)))
            self._turn_with_images = turn if turn.images else None

    @property
    def ends_with_images(self) -> bool:
        """Whether the results of the last turn have images, which no server has accepted yet."""
        return self._turn_with_images is not None and self.image_place != "none"

    def move_images(self, place: ImagePlace) -> None:
        """Puts the images of the last turn, and those of the turns to come, in another place."""
        self.image_place = place
        if self._turn_with_images is None:
            return
        old = self._groups_after_task[-1]
        # The first message stays, because reasoning may have been added to it.
        new = [old[0], *list(self._turn_with_images.as_messages(ended=True, image_place=place))[1:]]
        self.size += sum(map(size_of, new)) - sum(map(size_of, old))
        self._messages[-len(old) :] = new
        old[:] = new
        self._to_send = None

    def trim(self, excess: int) -> bool:
        """Removes the oldest exchanges and turns from the messages to send, but never the task and the last turn.

        Args:
            excess: How many bytes to leave out, as `size` counts them.

        Returns:
            Whether anything was left out.
        """
        goal, initial_size = self.size - excess, self.size
        while self.size > goal and self._groups_before_task:
            self._drop(self._groups_before_task.pop(0))
        while self.size > goal and len(self._groups_after_task) > 1:
            self._drop(self._groups_after_task.pop(0))
        return self.size < initial_size

    def _append(self, messages: list[Message]) -> None:
        self._turn_with_images = None
        self._messages.extend(messages)
        self._groups_after_task.append(messages)
        if self._to_send is not None:
            self._to_send += messages
        self.size += sum(map(size_of, messages))

    def _drop(self, messages: list[Message]) -> None:
        self._to_send = None
        self.size -= sum(map(size_of, messages))


def size_of(message: Mapping[str, Any]) -> int:
    """Returns the bytes that a message takes as JSON. An image counts as 3,000 bytes, whatever its size."""
    content = message.get("content")
    if isinstance(content, list):
        return sum(_IMAGE_BYTES if part.get("type") == "image_url" else len(_encode(part)) for part in content)
    return len(_encode(message))


_encode: Final = msgspec.json.Encoder().encode


def valid_arguments(arguments: object) -> str:
    """Returns the arguments of a call as the text of a JSON object, which is "{}" if they are anything else.

    A valid text is returned unchanged. Some servers send an object, and some models encode their JSON twice; both are
    called with the object, so this returns the text of that.
    """
    if isinstance(arguments, MAPPING_TYPES):
        return _encode(arguments).decode()
    try:
        value = msgspec.json.decode(arguments) if isinstance(arguments, str) else None
        if isinstance(value, str):
            return json.dumps(decoded) if isinstance(decoded := msgspec.json.decode(value), dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"
    return str(arguments) if isinstance(value, dict) else "{}"


def _resendable_call(call: Mapping[str, Any]) -> Message:
    """Returns a call that can be sent again. Malformed arguments would make llama.cpp answer 500 for ever (#25510)."""
    function = call["function"]
    sent = {"name": _sendable_name(function["name"]), "arguments": valid_arguments(function["arguments"])}
    return {"id": str(call["id"]), "type": "function", "function": sent, **_signature(call)}


def _sendable_name(name: str) -> str:
    """Returns the name of a call, or one that resembles it if servers would refuse it."""
    name = _UNSENDABLE.sub("_", name[: 2 * LONGEST_NAME])[:LONGEST_NAME]
    return name if name.strip("_-") else _NAMELESS


def _signature(call: Mapping[str, Any]) -> Message:
    """Returns the field in which Gemini keeps the signature of its reasoning, and without which it refuses a call."""
    return {"extra_content": call["extra_content"]} if call.get("extra_content") else {}


def _result_message(call_id: str, content: str | list[Mapping[str, Any]]) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# The conversation that a run continues


def _deep_copy(value: Any) -> Any:
    """Copies a JSON value by encoding and decoding it, which is faster than `copy.deepcopy`."""
    return msgspec.json.decode(_encode(value))


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Message]]:
    """Returns the system prompt, and copies of the other messages in the form that all servers accept."""
    check_messages(messages)
    read: list[Message] = msgspec.json.decode(encode_body({"messages": messages}))["messages"]
    system = [_plain_text(each) for each in read if each["role"] in ("system", "developer")]
    others = [
        _normalize(each, number) for number, each in enumerate(read) if each["role"] not in ("system", "developer")
    ]
    check_pairs(others)
    return "\n\n".join(filter(None, system)), others


def _normalize(message: Message, number: int) -> Message:
    message["content"] = "" if message.get("content") is None else message["content"]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        return message
    try:
        message["tool_calls"] = [_normalize_call(call) for call in message["tool_calls"]]
    except (KeyError, TypeError, ValueError) as exc:
        raise LLMValidationError(
            f"messages[{number}] has a tool call without an id, a name, or arguments that are a JSON object",
            exc,
            hint="leave out the call and its result",
        ) from exc
    return message


def _normalize_call(call: Mapping[str, Any]) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, dict):
        arguments = _encode(arguments).decode()
    if not isinstance(msgspec.json.decode(arguments), dict) or not function["name"] or not call["id"]:
        raise ValueError("not a tool call")
    sent = {"name": _sendable_name(function["name"]), "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": sent, **_signature(call)}


def check_pairs(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that every call has exactly one result, directly after its message.

    Raises:
        LLMValidationError: A result is missing, or belongs to no call.
    """
    # How many results each id of a call still lacks. The keys are texts in quotes, because an id may be any value.
    pending: Counter[str] = Counter()
    for message in messages:
        if message["role"] == "tool":
            call_id = repr(message.get("tool_call_id"))
            if call_id not in pending:
                raise LLMValidationError(
                    f"messages have a result for the call {call_id}, but no such call before it",
                    hint=_PAIRS_HINT,
                )
            pending[call_id] -= 1
            if not pending[call_id]:
                del pending[call_id]
        elif pending:
            break
        else:
            pending = Counter(repr(call["id"]) for call in message.get("tool_calls") or ())
    if pending:
        raise LLMValidationError(f"messages have no result for the call {next(iter(pending))}", hint=_PAIRS_HINT)


def _group_by_user_message(messages: list[Message]) -> list[list[Message]]:
    """Returns the messages in groups, each of which begins with a user message."""
    groups: list[list[Message]] = []
    for message in messages:
        if not groups or message["role"] == "user":
            groups.append([])
        groups[-1].append(message)
    return groups


def _join_contents(before: str | list[Any], task: str | list[Any]) -> str | list[Any]:
    if isinstance(before, str) and isinstance(task, str):
        return f"{before}\n\n{task}"
    return [*_as_parts(before), *_as_parts(task)]


def _as_parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _plain_text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
