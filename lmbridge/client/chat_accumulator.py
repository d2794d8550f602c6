"""Chunks of a stream, accumulated into the reply that the plain call would have returned.

Accumulation is incremental: each chunk is merged when it is handed to the caller, and only its text is kept. The reply
so far is therefore available at any moment, and every error can carry it as `.partial`.

The alternatives were worse. Keeping the chunks and merging them on demand is simpler, but a long answer then holds
thousands of nested dicts, which cost memory and slow the garbage collector down, and each access to `.partial` merges
them all again. If only `collect` merged chunks, errors could not carry a partial reply. A generic recursive merge, as
some libraries use it, gets names, roles, usage and tool calls wrong, because servers repeat some fields and leave
others out. Therefore each known field has its own rule, and the generic merge is used only for unknown fields.

`add` runs once for each token of every stream, which makes it one of the three places in lmbridge where speed is worth
some readability. A chunk that holds nothing but one more piece of text, or of arguments, takes a fast path; any other
chunk takes the slow path, which knows all rules. Both must give the same result, and the tests compare them for every
sequence of three chunks.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast

from lmbridge._checks import MAPPING_TYPES
from lmbridge._tasks import ITEMS_PER_STEP, list_in_slices, run_at_once, run_in_slices
from lmbridge._text import has_lone_surrogates, join_surrogates, replace_lone_surrogates, shorten
from lmbridge.client import failures
from lmbridge.client.completion_shape import aborted_error, complete_chunk, error_in_choice, flatten_choice_in_slices
from lmbridge.client.content_parts import flatten_in_slices, text_in_slices, text_of_part
from lmbridge.client.error_body import parse_error_body
from lmbridge.client.surrogates import replace_surrogates_in_slices
from lmbridge.client.tool_call_accumulator import (
    FunctionCallAccumulator,
    ToolCallAccumulator,
    copy_fields,
    is_label,
    merge_field,
)
from lmbridge.errors import LLMStreamError

if TYPE_CHECKING:
    from lmbridge.types import ChatCompletion

_TEXT_FIELDS: Final = frozenset({"reasoning_content", "reasoning", "refusal"})
"""The fields of a delta, besides `content`, whose values are pieces of a text, or lists of parts with such pieces. The
strings in fields that lmbridge does not know are pieces as well, unless the field's name is that of a label."""
_CHOICE_FIELDS: Final = frozenset({"index", "delta", "finish_reason", "message", "error"})
"""The fields of a choice that are merged by special rules."""
_QUOTED_CHUNK_CHARACTERS: Final = 200
"""The number of characters of a malformed chunk that the error quotes."""


class ChatAccumulator:
    """Merges the chunks of a chat completion into the reply so far.

    For example::

        accumulator = ChatAccumulator()
        async for chunk in stream:
            accumulator.add(chunk)
        reply = accumulator.reply()

    Args:
        choices: The number of answers that were asked for (`n`). The reply is not finished before each of them is.

    Attributes:
        has_begun: Whether any chunk was added.
        has_delta: Whether any chunk had a delta with at least one field; a role alone is enough.
        ends_with_text: Whether the newest finish reason arrived together with a piece of its answer.
        usage: The token usage in the last chunk that had one, or None.
    """

    __slots__ = (
        "_choices",
        "_expected_choices",
        "_fast_path_fields",
        "_fields",
        "_finished_choices",
        "_first_content",
        "_goes_on",
        "ends_with_text",
        "has_begun",
        "has_delta",
        "usage",
    )

    _FIELD: ClassVar[Literal["delta", "text"]] = "delta"
    """The field of a choice that holds the piece of the answer."""

    def __init__(self, choices: int = 1) -> None:
        self.has_begun: bool = False
        self.has_delta: bool = False
        self.ends_with_text: bool = False
        self.usage: Any = None
        self._expected_choices = choices
        self._choices: dict[int, _ChoiceAccumulator] = {}
        self._finished_choices = 0
        # Whether an answer went on after its finish reason. Some servers put one into every chunk.
        self._goes_on = False
        self._fields: dict[str, Any] = {}
        # The content of choice 0, which the fast path writes to without looking the choice up.
        self._first_content = io.StringIO()
        # The number of fields of the last chunk. The next chunk can take the fast path only if it has as many. With -1,
        # it takes the slow path in any case.
        self._fast_path_fields = -1

    @property
    def has_content(self) -> bool:
        """Whether any chunk held a piece of an answer: text, a call, another field of the message, or a finish reason.

        Unlike for `has_delta`, neither a role nor an empty text counts.
        """
        return any(choice.has_content for choice in self._choices.values())

    @property
    def has_answer(self) -> bool:
        """Whether any chunk held a piece of an answer that is more than reasoning."""
        return any(choice.has_answer for choice in self._choices.values())

    @property
    def is_finished(self) -> bool:
        """Whether every answer that was asked for, and every other one that began, has its finish reason.

        If an answer has gone on after its finish reason, the finish reasons of this server mean nothing. Then the reply
        never counts as finished.
        """
        return self._expected_choices <= len(self._choices) == self._finished_choices and not self._goes_on

    def add(self, chunk: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds a chunk.

        Returns:
            The chunk for the caller, with all fields that lmbridge guarantees. It is a changed copy if the server
            left any of them out.

        Raises:
            LLMStreamError: The chunk does not have the shape of a chat completion chunk.
            LLMError: A choice of the chunk reports an error, or that the server has broken the answer off.
        """
        # The fast path. It checks for usage, because some servers send it in every chunk, or from some chunk on.
        try:
            if len(chunk) == self._fast_path_fields:
                (choice,) = chunk["choices"]
                if (
                    choice["finish_reason"] is None
                    and choice["index"] == 0
                    and (choice["logprobs"] is None if len(choice) == 4 else len(choice) == 3)
                    and not chunk.get("usage")
                    and self._extend(choice)
                ):
                    return chunk
        except (AttributeError, KeyError, TypeError, ValueError):
            # The chunk has another shape.
            pass
        return self._add_by_slow_path(chunk)

    def add_in_slices(self, chunk: Mapping[str, Any]) -> Generator[None, None, Mapping[str, Any]]:
        """Does what `add` does, as a generator that yields after every 100 choices, parts or pieces of tool calls.

        Until the generator has ended, the reply so far has only the beginning of the chunk, and no other chunk may be
        added.
        """
        try:
            completed, parts = yield from self._complete_in_slices(chunk)
            self._begin_chunk(completed)
            for number, part in enumerate(parts, 1):
                self.has_delta |= yield from self._choice_of(part).add_in_slices(part)
                if number % ITEMS_PER_STEP == 0:
                    yield
        except (AttributeError, TypeError, ValueError, RecursionError) as exc:
            raise _unknown_shape_error(chunk, exc) from exc
        self._end_chunk(completed)
        for number, part in enumerate(parts, 1):
            _check_not_broken(part)
            if number % ITEMS_PER_STEP == 0:
                yield
        return completed

    def _complete_in_slices(
        self, sent: Mapping[str, Any]
    ) -> Generator[None, None, tuple[Mapping[str, Any], list[dict[str, Any]]]]:
        """Does what `_complete` does, as a generator that yields after every 100 choices or parts."""
        choices = sent.get("choices")
        if not isinstance(choices, list):
            return self._complete(sent)
        completed: list[dict[str, Any]] = []
        parts: list[dict[str, Any]] = []
        for begin in range(0, len(choices), ITEMS_PER_STEP):
            some = choices[begin : begin + ITEMS_PER_STEP]
            flat = list(some)
            for place, choice in enumerate(some):
                flat[place] = yield from flatten_choice_in_slices(choice, self._FIELD)
            done = complete_chunk({"choices": flat}, self._FIELD)["choices"]
            completed += done
            parts += self._as_chat_choices(done, {"choices": some})
            if len(some) == ITEMS_PER_STEP:
                yield
        return {**sent, "choices": completed}, parts

    def _complete(self, sent: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        """Returns a chunk with the fields that lmbridge guarantees, and its choices as those of a chat completion."""
        chunk = complete_chunk(sent, self._FIELD)
        return chunk, self._as_chat_choices(chunk["choices"], sent)

    def _extend(self, choice: Mapping[str, Any]) -> bool:
        """Adds a choice on the fast path if it only continues a text or the last call, and returns whether it did."""
        delta = choice["delta"]
        if len(delta) != 1:
            return False
        text = delta.get("content")
        if type(text) is str:
            self.has_delta = True
            self._first_content.write(text)
            return True
        return self._choices[0].extend(delta)

    def _as_chat_choices(
        self,
        choices: list[dict[str, Any]],
        sent: Mapping[str, Any],  # noqa: ARG002 - text completions need it
    ) -> list[dict[str, Any]]:
        """Returns the choices of a completed chunk as those of a chat completion. `sent` is the chunk as it arrived."""
        return choices

    def _add_by_slow_path(self, chunk: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds any chunk, and returns the chunk for the caller; see `add`."""
        try:
            completed, parts = self._complete(chunk)
            self._begin_chunk(completed)
            for part in parts:
                self.has_delta |= self._choice_of(part).add(part)
        except (AttributeError, TypeError, ValueError, RecursionError) as exc:
            raise _unknown_shape_error(chunk, exc) from exc
        self._end_chunk(completed)
        for part in parts:
            _check_not_broken(part)
        return completed

    def _begin_chunk(self, chunk: Mapping[str, Any]) -> None:
        """Merges the fields of a completed chunk, except its choices."""
        self.has_begun = True
        fields, values = self._fields, chunk.values()
        if None in values or "" in values:
            # A later chunk may leave out what an earlier one named; then the earlier value stays.
            fields.update({key: value for key, value in chunk.items() if value not in (None, "") or key not in fields})
        else:
            fields.update(chunk)
        # `reply` replaces this value. The key is set here so that the fields keep the order in which they arrived.
        fields["choices"] = None
        usage = chunk.get("usage")
        if usage and isinstance(usage, MAPPING_TYPES):
            self.usage = usage

    def _choice_of(self, part: Mapping[str, Any]) -> _ChoiceAccumulator:
        """Returns the accumulator of a choice, and records whether this chunk finishes it, or goes on after its end."""
        index = part.get("index") or 0
        choice = self._choices.get(index)
        if choice is None:
            choice = _ChoiceAccumulator(self._first_content if index == 0 else io.StringIO())
            self._choices[index] = choice
        was_finished, finishes = choice.finish_reason is not None, part.get("finish_reason")
        if was_finished or finishes:
            has_text = _adds_to_answer(part["delta"])
            self._goes_on |= was_finished and has_text
            if finishes:
                self.ends_with_text = has_text
                self._finished_choices += not was_finished
        return choice

    def _end_chunk(self, chunk: Mapping[str, Any]) -> None:
        """Decides whether the next chunk may take the fast path, after the whole of this one was added."""
        # The fast path neither creates choices nor merges fields, so it is only for chunks that have the same fields as
        # this one. It also does not notice if an answer goes on after its finish reason.
        first = self._choices.get(0)
        is_open = first is not None and first.finish_reason is None
        self._fast_path_fields = len(chunk) if is_open and not chunk.get("usage") else -1

    def reply(self) -> ChatCompletion:
        """Returns the reply so far as a new dict. Its `usage` is that of the last chunk that had one, or None."""
        choices = [choice.as_dict(index, choice.calls()) for index, choice in sorted(self._choices.items())]
        reply: ChatCompletion = replace_lone_surrogates(self._reply(choices))
        return reply

    async def reply_in_slices(self) -> ChatCompletion:
        """Does what `reply` does for a complete reply, and lets other tasks run after every 100 choices or calls."""
        choices: list[dict[str, Any]] = []
        for number, (index, choice) in enumerate(sorted(self._choices.items()), 1):
            choices.append(choice.as_dict(index, await list_in_slices(choice.calls())))
            if number % ITEMS_PER_STEP == 0:
                await asyncio.sleep(0)
        reply: ChatCompletion = self._reply(choices)
        return await run_in_slices(replace_surrogates_in_slices(reply)) if has_lone_surrogates(reply) else reply

    def _reply(self, choices: list[dict[str, Any]]) -> Any:
        return {**self._fields, "object": "chat.completion", "choices": choices, "usage": self.usage}


class TextAccumulator(ChatAccumulator):
    """Merges the chunks of a text completion into the reply so far.

    Each choice is converted to one of a chat completion whose content is the text, and the result is converted back.
    """

    __slots__ = ()

    _FIELD = "text"

    def _extend(self, choice: Mapping[str, Any]) -> bool:
        text = choice["text"]
        if type(text) is not str:
            return False
        self.has_delta = True
        self._first_content.write(text)
        return True

    def _as_chat_choices(self, choices: list[dict[str, Any]], sent: Mapping[str, Any]) -> list[dict[str, Any]]:
        # A choice that the server sent without a text adds nothing, although `complete_chunk` gives it an empty one.
        each_sent = [choice for choice in sent.get("choices") or () if isinstance(choice, Mapping)]
        return [
            _as_chat_choice(choice, has_text=each.get("text") is not None)
            for choice, each in zip(choices, each_sent, strict=True)
        ]

    def reply(self) -> Any:
        """Returns the reply so far as a new dict. Its `usage` is that of the last chunk that had one, or None."""
        return super().reply()

    async def reply_in_slices(self) -> Any:
        """Returns what `reply` returns for a complete reply, and lets other tasks run in between."""
        return await super().reply_in_slices()

    def _reply(self, choices: list[dict[str, Any]]) -> Any:
        as_texts = [{"text": choice.pop("message")["content"], "logprobs": None, **choice} for choice in choices]
        return {**super()._reply(as_texts), "object": "text_completion"}


def accumulator_for(chunk: object) -> ChatAccumulator:
    """Returns an empty accumulator for the kind of stream that begins with this chunk."""
    try:
        is_text = chunk["object"] == "text_completion" or "text" in chunk["choices"][0]  # type: ignore[index]  # it may be anything
    except (KeyError, TypeError, IndexError):
        is_text = False
    return TextAccumulator() if is_text else ChatAccumulator()


class _ChoiceAccumulator:
    """Merges the pieces of one answer. Fields that most answers lack are created only when they arrive."""

    __slots__ = (
        "_choice_fields",
        "_content",
        "_function_call",
        "_message_fields",
        "_other_texts",
        "_role",
        "_tool_calls",
        "finish_reason",
    )

    def __init__(self, content: io.StringIO) -> None:
        self.finish_reason: str | None = None
        self._role = "assistant"
        self._content = content
        self._other_texts: dict[str, io.StringIO] | None = None
        self._tool_calls: ToolCallAccumulator | None = None
        self._function_call: FunctionCallAccumulator | None = None
        # Unknown fields of the message, and of the choice that contains it.
        self._message_fields: dict[str, Any] | None = None
        self._choice_fields: dict[str, Any] | None = None

    @property
    def has_content(self) -> bool:
        texts = (self._content, *(self._other_texts or {}).values())
        others = (self.finish_reason, self._tool_calls, self._function_call, self._message_fields)
        return any(text.tell() for text in texts) or any(other is not None for other in others)

    @property
    def has_answer(self) -> bool:
        if self._content.tell() > 0 or self._tool_calls is not None or self.finish_reason is not None:
            return True
        return self._function_call is not None or "refusal" in (self._other_texts or ())

    def extend(self, delta: Mapping[str, Any]) -> bool:
        """Appends a delta with one field if it only continues a text or the last call, and returns whether it did."""
        if self._tool_calls is not None and self._tool_calls.extend_last(delta.get("tool_calls")):
            return True
        ((key, value),) = delta.items()
        text = None if self._other_texts is None or type(value) is not str else self._other_texts.get(key)
        if text is None:
            return False
        text.write(value)
        return True

    def add(self, part: Mapping[str, Any]) -> bool:
        """Adds a choice of a completed chunk, and returns whether its delta had any field."""
        delta = part["delta"]
        if not delta and "message" in part:
            delta = run_at_once(self._whole_message_in(part))
        for key, value in delta.items():
            if value is None:
                continue
            if key == "tool_calls":
                self._add_calls(value)
            else:
                self._add_message_field(key, value)
        self.finish_reason = part.get("finish_reason") or self.finish_reason
        for key in part:
            if key not in _CHOICE_FIELDS and part[key] is not None:
                self._choice_fields = self._choice_fields or {}
                merge_field(self._choice_fields, key, part[key], joins_texts=False)
        return bool(delta)

    def add_in_slices(self, part: Mapping[str, Any]) -> Generator[None, None, bool]:
        """Does what `add` does, as a generator that yields after every 100 pieces of tool calls, or of a text."""
        delta = part["delta"] or (yield from self._whole_message_in(part))
        rest = dict(delta)
        pieces = delta.get("tool_calls")
        if isinstance(pieces, list) and len(pieces) > ITEMS_PER_STEP:
            del rest["tool_calls"]
            for begin in range(0, len(pieces), ITEMS_PER_STEP):
                self._add_calls(pieces[begin : begin + ITEMS_PER_STEP])
                yield
        for key in _TEXT_FIELDS.intersection(rest):
            if isinstance(rest[key], list | Mapping):
                rest[key] = yield from text_in_slices(rest[key])
        self.add({**part, "delta": rest})
        return bool(delta)

    def _whole_message_in(self, part: Mapping[str, Any]) -> Generator[None, None, Mapping[str, Any]]:
        """Returns the message that some servers send in place of all deltas, or an empty dict."""
        message = part.get("message")
        if not message or not isinstance(message, Mapping) or self.has_content:
            return {}
        whole = dict(message)
        yield from flatten_in_slices(whole)
        return whole

    def _add_calls(self, value: Any) -> None:
        self._tool_calls = self._tool_calls or ToolCallAccumulator()
        # Some servers send a single call without a list around it.
        is_single = type(value) is not list and isinstance(value, MAPPING_TYPES) and "function" in value
        for piece in cast("list[Any]", [value] if is_single else value):
            self._tool_calls.add(piece)

    def _add_message_field(self, key: str, value: Any) -> None:
        if key == "content":
            self._content.write(value)
        elif key == "role":
            self._role = value if value and isinstance(value, str) else self._role
        elif key == "function_call":
            self._function_call = self._function_call or FunctionCallAccumulator()
            self._function_call.extend(value)
        elif key in _TEXT_FIELDS or (isinstance(value, str) and not is_label(key)):
            text = text_of_part(value) if isinstance(value, list | Mapping) else value
            self._other_texts = self._other_texts or {}
            self._other_texts.setdefault(key, io.StringIO()).write(text)
        else:
            self._message_fields = self._message_fields or {}
            merge_field(self._message_fields, key, value)

    def calls(self) -> Iterable[dict[str, Any]]:
        """Returns an iterator over the calls so far. It builds the dict of each call only when it reaches the call."""
        return () if self._tool_calls is None else self._tool_calls.calls()

    def as_dict(self, index: int, calls: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Returns the choice as a dict, with the tool calls that the method `calls` has returned."""
        message: dict[str, Any] = {"role": self._role, "content": join_surrogates(self._content.getvalue())}
        if self._other_texts is not None:
            message |= {key: join_surrogates(text.getvalue()) for key, text in self._other_texts.items()}
        if self._message_fields is not None:
            message |= copy_fields(self._message_fields)
        if listed := list(calls):
            message["tool_calls"] = listed
        if self._function_call is not None:
            message["function_call"] = self._function_call.function()
        choice = {"index": index, "message": message, "finish_reason": self.finish_reason}
        return choice if self._choice_fields is None else choice | copy_fields(self._choice_fields)


def _adds_to_answer(delta: Mapping[str, Any]) -> bool:
    """Returns whether a delta has a piece of an answer: some text, or a piece of a call."""
    return any(
        value and (key in ("tool_calls", "function_call") or (isinstance(value, str) and not is_label(key)))
        for key, value in delta.items()
    )


def _as_chat_choice(choice: Mapping[str, Any], *, has_text: bool) -> dict[str, Any]:
    part = dict(choice)
    text = part.pop("text")
    part["delta"] = {"content": text} if has_text else {}
    return part


def _check_not_broken(choice: Mapping[str, Any]) -> None:
    """Checks that a choice does not say that its answer will never be finished.

    Raises:
        LLMError: The choice reports an error, or has a finish reason that says that the server broke the answer off.
    """
    if not (choice.get("finish_reason") or "error" in choice or "error" in choice["delta"] or "message" in choice):
        return
    if (body := error_in_choice(choice)) is not None:
        raise failures.error_from_event(parse_error_body(body), {})
    if (error := aborted_error(choice)) is not None:
        raise error


def _unknown_shape_error(chunk: object, exc: Exception) -> LLMStreamError:
    shown = shorten(repr(chunk), _QUOTED_CHUNK_CHARACTERS)
    return LLMStreamError(f"the stream holds a chunk of an unknown shape: {shown}", exc)
