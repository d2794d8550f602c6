"""`History`: the conversation of a run, which is valid at every moment, and the form of it that is sent to the model.

Servers accept a conversation only if it follows rules: it has one leading system message, a result directly after every
call, arguments that are valid JSON, and no content that is null. A run would break these rules while its tools are
running, and a cancelled run would break them for good. So the assistant message whose calls are being made is kept
apart, as a `Turn`, and joins the conversation only together with all its results; a copy that is taken before that has
placeholders for the missing results. The alternative was to let each caller repair the conversation afterwards.

The messages to send and the messages that the user sees are two lists. Compaction changes only the former: it shortens
results of tools, and leaves out whole groups of messages. A group is an exchange before the task, or a turn with its
results, so a call is never sent without its result. Messages that compaction has not touched are sent again without the
change of a single byte, so that a server can reuse its prompt cache. They are changed only if the server refuses them
as they are. The module `compaction` decides when room is made, and how much.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from operator import itemgetter
from typing import Any, Final, cast

import attrs
import msgspec

from lmbridge._checks import MAPPING_TYPES
from lmbridge._tasks import ITEMS_PER_STEP, list_in_slices
from lmbridge.agent.continued_messages import (
    Message,
    call_signature,
    group_by_user_message,
    read_messages,
    sendable_name,
)
from lmbridge.agent.result_images import NOT_SHOWN, ImagePlace, image_messages
from lmbridge.agent.tool_results import truncate_output
from lmbridge.client.input_checks import CheckedList
from lmbridge.client.json_codec import encode_body
from lmbridge.client.token_count import size_of

_STILL_RUNNING_RESULT: Final = "No result: the tool is still running."
_NOT_CALLED_RESULT: Final = "Not called: the run ended first."
_INTERRUPTED_RESULT: Final = (
    "No result: the run ended while the tool was running. It may still be running, and it may or may not have had"
    " its effect."
)
_OMISSION_BYTES: Final = 60
"""The largest number of bytes that the note about omitted characters takes."""


@attrs.define
class Turn:
    """An assistant message whose calls are being made."""

    message: Message
    """The assistant message."""
    results: dict[str, Message | None]
    """The messages with the results, without their images, in order. The keys are the ids of the calls; a call that has
    no result yet has None."""
    size: int
    """The bytes of the assistant message and of the results; see `size_of`."""
    begun: set[str] = attrs.field(factory=set)
    """The ids of the calls that have been started."""
    images: dict[str, Sequence[Mapping[str, Any]]] = attrs.field(factory=dict)
    """The images of the results, as content parts. The keys are the ids of the calls."""

    def begin(self, call_ids: Iterable[str]) -> None:
        """Records that calls have been started."""
        self.begun.update(call_ids)

    def answer(self, call_id: str, text: str, images: Sequence[Mapping[str, Any]] = ()) -> None:
        """Adds the result of a call, and its images as content parts.

        The size of each result is computed when it arrives, so that the end of a turn with thousands of results takes
        little time.
        """
        message = self.results[call_id] = _result_message(call_id, text)
        self.size += size_of(message)
        if images:
            self.images[call_id] = images

    def as_messages(self, *, ended: bool, image_place: ImagePlace = "user") -> Iterator[Message]:
        """Yields the message, its results or placeholders for those that are missing, and the images of the results."""
        yield self.message
        for call_id, result in self.results.items():
            images = self.images.get(call_id) if self.images else None
            if result is None:
                yield _result_message(call_id, self._placeholder(call_id, ended=ended))
            elif images and image_place == "tool":
                yield _result_message(call_id, [{"type": "text", "text": result["content"]}, *images])
            elif images and image_place == "none":
                yield _result_message(call_id, f"{result['content']}\n{NOT_SHOWN}")
            else:
                yield result
        if self.images and image_place == "user":
            names = [call["function"]["name"] for call in self.message["tool_calls"]]
            yield from image_messages(names, [self.images.get(call_id, ()) for call_id in self.results])

    def plain_messages(self) -> list[Message] | None:
        """Returns the message and its results, if no result is missing and none has images; otherwise None.

        The attribute `size` is the size of these messages. There may be thousands of them, so they are not collected by
        a loop in Python.
        """
        results = list(self.results.values())
        return None if self.images or None in results else [self.message, *cast("list[Message]", results)]

    def _placeholder(self, call_id: str, *, ended: bool) -> str:
        if not ended:
            return _STILL_RUNNING_RESULT
        return _INTERRUPTED_RESULT if call_id in self.begun else _NOT_CALLED_RESULT


@attrs.frozen
class Groups:
    """The messages to send, apart from the system message and the task. Each group can only be left out as a whole."""

    before_task: list[list[Message]]
    """The exchanges before the task, oldest first."""
    after_task: list[list[Message]]
    """The turns after the task, oldest first."""


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
        system, before = read_messages(messages) if messages else ("", [])
        system = system if system_prompt is None else system_prompt
        self._head: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = before
        # Groups of messages that can only be left out as a whole, oldest first: before the task, and after it.
        self._groups_before_task = group_by_user_message(before)
        if before and before[-1]["role"] == "user":
            # Many chat templates refuse two user messages in a row.
            self._task = {"role": "user", "content": _join_contents(before.pop()["content"], task)}
            self._groups_before_task[-1].pop()
        else:
            self._task = {"role": "user", "content": task}
        before.append(self._task)
        # The task in the form that is sent, which may be followed by a note about what was left out.
        self._sent_task = self._task
        self._groups_after_task: list[list[Message]] = []
        # The names and arguments of the calls whose results were shortened.
        self._shortened_calls: set[tuple[str, str]] = set()
        self._turn: Turn | None = None
        self.image_place: ImagePlace = "user"
        # The last turn, if its results have images, and the number of characters to which its results were shortened.
        self._turn_with_images: Turn | None = None
        self._kept_of_last_results: dict[str, int] = {}
        # The fields that send the reasoning of a message back. The keys are the positions in `_messages`.
        self._reasoning: dict[int, Mapping[str, str]] = {}
        self._sends_reasoning = False
        self._demanded_field: str | None = None
        self._nudges: list[Message] = []
        # The messages to send, without the nudges. New messages are appended to this list; any other change sets it to
        # None, so that it is built again.
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

    @property
    def task_text(self) -> str:
        """The task, if it is a text; an empty text if it has other parts."""
        content = self._task["content"]
        return content if isinstance(content, str) else ""

    @property
    def has_calls(self) -> bool:
        """Whether the conversation has any call, of this run or of the conversation that it continues."""
        return any("tool_calls" in message for message in self._messages)

    def to_send(self) -> CheckedList:
        """Returns the messages of the next request: a new list of the same dicts, which must not be changed."""
        if self._to_send is None:
            groups = (self._head, *self._groups_before_task, [self._sent_task], *self._groups_after_task)
            self._to_send = CheckedList(message for group in groups for message in group)
        messages = CheckedList(self._to_send)
        messages += self._nudges
        return messages

    def snapshot(self, *, ended: bool) -> list[Message]:
        """Returns a copy of the whole conversation, which is valid at any moment.

        Args:
            ended: True if the run has ended, so that the missing results will never arrive.
        """
        return copy_messages(self._conversation(ended=ended))

    async def snapshot_in_slices(self) -> list[Message]:
        """Returns the copy that `snapshot` returns for a run that has ended, without blocking the event loop."""
        copied = await list_in_slices(map(_copy_without_calls, self._conversation(ended=True)))
        for number, message in enumerate(copied, 1):
            if calls := message.get("tool_calls"):
                message["tool_calls"] = await list_in_slices(map(_copy_call, calls))
            if number % ITEMS_PER_STEP == 0:
                await asyncio.sleep(0)
        return copied

    def _conversation(self, *, ended: bool) -> list[Message]:
        turn = [] if self._turn is None else self._turn.as_messages(ended=ended, image_place=self.image_place)
        return [*self._head, *self._messages, *turn]

    def send_reasoning(self, demanded_field: str | None = None) -> bool:
        """Adds the model's reasoning to its messages, both to those so far and to those to come.

        Args:
            demanded_field: The field that the server demands. Each message of the model then has this field, which is
                empty if its reasoning is unknown. By default, the reasoning is sent in the field in which it arrived.

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
            reasoning: The fields that send the reasoning back; they become a part of the message if reasoning is sent.
            follow_up: A user message that asks for another answer. Default: none.
        """
        self._reasoning[len(self._messages)] = reasoning or {}
        answer = self._with_reasoning({"role": "assistant", "content": text}, reasoning or {})
        added = [answer] if follow_up is None else [answer, {"role": "user", "content": follow_up}]
        self._append(added, sum(map(size_of, added)))

    def add_nudge(self, reply: str, nudge: str, *, reasoning: Mapping[str, str] | None = None) -> None:
        """Adds a flawed reply and a message about it to the messages to send, until `drop_nudges` is called.

        Args:
            reply: The text of the reply, which must not be empty.
            nudge: The message about the reply.
            reasoning: The fields that send the reasoning back; they become a part of the message if reasoning is sent.
        """
        answer = self._with_reasoning({"role": "assistant", "content": reply}, reasoning or {})
        added = [answer, {"role": "user", "content": nudge}]
        self._nudges += added
        self.size += sum(map(size_of, added))

    def drop_nudges(self) -> None:
        """Removes what `add_nudge` has added."""
        self.size -= sum(map(size_of, self._nudges))
        self._nudges = []

    def begin_turn(
        self, text: str, calls: Iterable[Mapping[str, Any]], *, reasoning: Mapping[str, str] | None = None
    ) -> Turn:
        """Begins a turn with a reply that contains calls. `end_turn` adds the turn to the conversation.

        Args:
            text: The text of the reply.
            calls: Its calls, as `resendable_call` returns them. Each has a unique id.
            reasoning: The fields that send the reasoning back; they become a part of the message if reasoning is sent.
        """
        self._reasoning[len(self._messages)] = reasoning or {}
        message = self._with_reasoning(
            {"role": "assistant", "content": text, "tool_calls": list(calls)}, reasoning or {}
        )
        results: dict[str, Message | None] = dict.fromkeys(map(itemgetter("id"), message["tool_calls"]))
        self._turn = Turn(message, results, size_of(message))
        return self._turn

    def end_turn(self) -> None:
        """Adds the turn to the conversation. Calls without a result keep a placeholder."""
        turn, self._turn = self._turn, None
        if turn is not None:
            if (plain := turn.plain_messages()) is not None:
                self._append(plain, turn.size)
            else:
                messages = list(turn.as_messages(ended=True, image_place=self.image_place))
                self._append(messages, sum(map(size_of, messages)))
            self._turn_with_images = turn if turn.images else None

    @property
    def ends_with_images(self) -> bool:
        """Whether the conversation ends with results that have images, and these are sent."""
        return self._turn_with_images is not None and self.image_place != "none"

    def move_images(self, place: ImagePlace) -> None:
        """Moves the images of the last turn to another place, and puts those of later turns there as well."""
        self.image_place = place
        if self._turn_with_images is None:
            return
        turn, old = self._turn_with_images, self._groups_after_task[-1]
        shortened = attrs.evolve(turn, results={key: self._shortened(key, each) for key, each in turn.results.items()})
        # The first message stays, because reasoning may have been added to it.
        self._messages[-len(old) :] = [old[0], *list(turn.as_messages(ended=True, image_place=place))[1:]]
        new = [old[0], *list(shortened.as_messages(ended=True, image_place=place))[1:]]
        self.size += sum(map(size_of, new)) - sum(map(size_of, old))
        old[:] = new
        self._to_send = None

    def _shortened(self, call_id: str, result: Message | None) -> Message | None:
        """Returns a result of the last turn in the form that is sent, without its images."""
        kept = self._kept_of_last_results.get(call_id)
        if result is None or kept is None:
            return result
        return {**result, "content": truncate_output(result["content"], kept)}

    @property
    def fixed_size(self) -> int:
        """The bytes of the messages that are always sent: the system message and the task."""
        return sum(map(size_of, (*self._head, self._sent_task)))

    def groups(self) -> Groups:
        """Returns a copy of the groups as they are sent now, which later changes do not affect."""
        return Groups([[*group] for group in self._groups_before_task], [[*group] for group in self._groups_after_task])

    def with_head_and_task(self, groups: Groups) -> CheckedList:
        """Returns the system message and the given groups, with the task between them in the form that is sent."""
        parts = (self._head, *groups.before_task, [self._sent_task], *groups.after_task)
        return CheckedList(message for part in parts for message in part)

    def shorten_results(self, goal: int, *, longer_than: int, kept: int) -> int:
        """Shortens the oldest results of tools in the messages to send, but never those of the last turn.

        If the model has repeated a call because its result was shortened, the new result stays whole: there is
        something in it that the model needs.

        Args:
            goal: The size at which to stop.
            longer_than: The number of characters above which a result is shortened.
            kept: How many of its characters are kept.

        Returns:
            How many results were shortened.
        """
        count = 0
        for group in (*self._groups_before_task, *self._groups_after_task[:-1]):
            for place, call in _results_of_calls(group):
                if self.size <= goal:
                    return count
                if len(group[place]["content"]) > longer_than and call not in self._shortened_calls:
                    self._replace_result(group, place, kept)
                    self._shortened_calls.add(call)
                    count += 1
        return count

    def shorten_last_results(self, goal: int, *, kept: int) -> int:
        """Shortens the results of the last turn in the messages to send, as far as needed.

        Args:
            goal: The size to reach.
            kept: The smallest number of characters to which a result is shortened.

        Returns:
            How many results were shortened.
        """
        group = self._groups_after_task[-1] if self._groups_after_task else []
        excess = self.size - goal
        if excess <= 0:
            return 0
        # How many characters of each result can be omitted. The note about them takes some bytes as well.
        omissible = {
            place: characters
            for place, _ in _results_of_calls(group)
            if (characters := len(group[place]["content"]) - kept - _OMISSION_BYTES) > 0
        }
        total = sum(omissible.values())
        for place, characters in omissible.items():
            # Each character takes at least a byte, and every result gives the same part of what it can, rounded up.
            left = kept + characters - ceil(min(excess, total) * characters / total)
            self._kept_of_last_results[group[place]["tool_call_id"]] = left
            self._replace_result(group, place, left)
        return len(omissible)

    def count_oldest(self, goal: int) -> tuple[int, int]:
        """Returns how many of the oldest groups have to be left out to reach a size. The last turn always stays.

        Args:
            goal: The size to reach.

        Returns:
            The number of groups before the task, and of those after it.
        """
        size, counts = self.size, [0, 0]
        for kind, groups in enumerate((self._groups_before_task, self._groups_after_task[:-1])):
            for group in groups:
                if size <= goal:
                    break
                size -= sum(map(size_of, group))
                counts[kind] += 1
        return counts[0], counts[1]

    def leave_out(self, before_task: int, after_task: int, *, note: str = "") -> None:
        """Leaves the oldest groups out of the messages to send.

        Args:
            before_task: The number of groups before the task.
            after_task: The number of groups after the task.
            note: The note that follows the task, in place of an earlier one. By default, an earlier note stays.
        """
        for groups, count in ((self._groups_before_task, before_task), (self._groups_after_task, after_task)):
            self.size -= sum(size_of(message) for group in groups[:count] for message in group)
            del groups[:count]
        if note:
            self.size -= size_of(self._sent_task)
            self._sent_task = {**self._task, "content": _join_contents(self._task["content"], note)}
            self.size += size_of(self._sent_task)
        self._to_send = None

    def _replace_result(self, group: list[Message], place: int, kept: int) -> None:
        old = group[place]
        group[place] = {**old, "content": truncate_output(old["content"], kept)}
        self.size += size_of(group[place]) - size_of(old)
        self._to_send = None

    def _append(self, messages: list[Message], size: int) -> None:
        self._turn_with_images, self._kept_of_last_results = None, {}
        self._messages.extend(messages)
        self._groups_after_task.append(messages)
        if self._to_send is not None:
            self._to_send += messages
        self.size += size


_encode: Final = msgspec.json.Encoder().encode


def valid_arguments(arguments: object) -> str:
    """Returns the arguments of a call as the text of a JSON object, or "{}" if they are anything else.

    A valid text is returned unchanged. Some servers send an object instead of a text, and some models encode their JSON
    twice. The tool is called with the object in both cases, so this function returns the text of the object.
    """
    # Nearly all arguments are texts, for which a check against an abstract class would be slow.
    if not isinstance(arguments, str) and isinstance(arguments, MAPPING_TYPES):
        return _encode(arguments).decode()
    try:
        value = msgspec.json.decode(arguments) if isinstance(arguments, str) else None
        if isinstance(value, str):
            return json.dumps(decoded) if isinstance(decoded := msgspec.json.decode(value), dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"
    return str(arguments) if isinstance(value, dict) else "{}"


def resendable_call(call: Mapping[str, Any]) -> Message:
    """Returns a call that can be sent again.

    A name that servers refuse is replaced by a similar one, and arguments that are not an object by an empty object.
    With malformed arguments, llama.cpp would answer 500 to every later request of the run
    (https://github.com/ggml-org/llama.cpp/issues/25510).
    """
    function = call["function"]
    sent = {"name": sendable_name(function["name"]), "arguments": valid_arguments(function["arguments"])}
    return {"id": str(call["id"]), "type": "function", "function": sent, **call_signature(call)}


def _result_message(call_id: str, content: str | list[Mapping[str, Any]]) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _results_of_calls(group: Sequence[Message]) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yields the position of each result that is a text, with the name and the arguments of its call.

    The call is looked up in the last message with calls before the result, because other turns may have the same id.
    """
    calls: dict[str, tuple[str, str]] = {}
    for place, message in enumerate(group):
        if message.get("tool_calls"):
            calls = {
                call["id"]: (call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]
            }
        elif message["role"] == "tool" and isinstance(message["content"], str):
            yield place, calls[message["tool_call_id"]]


# Copies


def copy_messages(messages: Iterable[Message]) -> list[Message]:
    """Returns a copy of the messages of a run, which can be changed without an effect on the originals."""
    copies = list(map(_copy_without_calls, messages))
    for message in copies:
        if calls := message.get("tool_calls"):
            message["tool_calls"] = list(map(_copy_call, calls))
    return copies


def _copy_without_calls(message: Message) -> Message:
    """Returns a copy of a message that shares the list of calls with it, because there may be thousands of them."""
    copied = dict(message)
    for key, value in message.items():
        if type(value) is not str and key != "tool_calls" and isinstance(value, (dict, list)):
            copied[key] = _deep_copy(value)
    return copied


def _copy_call(call: Message) -> Message:
    """Returns a copy of a call that `resendable_call` has returned. The copy shares its texts, which may be long."""
    copied = {**call, "function": {**call["function"]}}
    if "extra_content" in call:
        copied["extra_content"] = _deep_copy(call["extra_content"])
    return copied


def _deep_copy(value: Any) -> Any:
    """Copies a JSON value by encoding and decoding it, which is faster than `copy.deepcopy`."""
    return msgspec.json.decode(_encode(value))


def _join_contents(first: str | list[Any], second: str | list[Any]) -> str | list[Any]:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_as_parts(first), *_as_parts(second)]


def _as_parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
