"""`ModelReply`: the parts of a chat completion that a run needs, whatever shape the server gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import attrs
import msgspec

from lmbridge._checks import is_integer
from lmbridge._tasks import list_in_slices, pause_after
from lmbridge.agent.reasoning_replay import reasoning_fields
from lmbridge.agent.text_calls.finding import without_repetition
from lmbridge.client.reasoning import split_reasoning
from lmbridge.client.tool_call_accumulator import generated_call_id
from lmbridge.types import Usage

WireCall: TypeAlias = Mapping[str, Any]
"""An entry of a message's `tool_calls`."""

_CALL_FINISH_REASONS: Final = ("tool_calls", "tool_call", "function_call", "tool_use")
"""Finish reasons which say that the reply requests calls."""
_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")


@attrs.define(kw_only=True)
class ModelReply:
    """One reply of the model."""

    text: str
    """The answer, without the reasoning."""
    reasoning: str
    """The reasoning, wherever the server put it."""
    is_only_reasoning: bool
    """Whether the whole reply arrived in the field for reasoning, so that the message has no content."""
    reasoning_fields: Mapping[str, str]
    """The fields of a message that send the reasoning back to the server; empty if the reply has no reasoning."""
    calls: Sequence[WireCall]
    """The calls that the model requests. Each has a unique id, a name and arguments, which may be anything."""
    finish_reason: str | None
    """Why the server stopped generating; None if it did not say."""
    usage: Usage | None
    """The tokens of the request, as the server counted them; None if it did not count them."""
    constrained_to: str | None = None
    """The tool to whose schema the reply was constrained, by its name in requests; None if it was not constrained."""
    may_call: bool = False
    """Whether the request offered tools, and did not forbid the model to call them."""
    max_tokens: int | None = None
    """The limit on the tokens of the reply, as it was requested; None if it is unknown."""
    has_stop_texts: bool = False
    """Whether the request named texts at which the server ends a reply, even in the middle of a call."""
    written_calls: str = ""
    """The text from which the calls were read; empty if the server has recognized them, or if there are none."""
    is_of_text_caller: bool = False
    """Whether the model has already written calls as text, in this run or in another one of the same agent."""
    tokens: int = 0
    """The tokens of prompt and reply, as the server counted them, or as they were estimated."""

    @classmethod
    async def from_completion(cls, completion: Mapping[str, Any]) -> ModelReply:
        """Reads a complete chat completion. If it is very large, other tasks get to run between the steps of reading.

        Args:
            completion: A reply in whose texts the accumulators have already replaced lone surrogates.
        """
        choices = completion.get("choices")
        choice = _as_object(next(iter(choices), None) if isinstance(choices, list) else None)
        message = _as_object(choice.get("message"))
        size = sum([len(value) for value in message.values() if isinstance(value, str)])
        await pause_after(size)
        reasoning, text = split_reasoning({"choices": [{"message": message}]})
        await pause_after(size)
        finish_reason = choice.get("finish_reason")
        return cls(
            text=text,
            reasoning=reasoning,
            is_only_reasoning=bool(reasoning) and not message.get("content"),
            reasoning_fields=reasoning_fields(message, reasoning),
            calls=await list_in_slices(_read_calls(message)),
            finish_reason=finish_reason if isinstance(finish_reason, str) else None,
            usage=_read_usage(completion),
        )

    @property
    def announces_calls(self) -> bool:
        """Whether the finish reason says that the reply requests calls, although it has none."""
        return not self.calls and self.finish_reason in _CALL_FINISH_REASONS

    @property
    def may_be_cut(self) -> bool:
        """Whether the end of the reply may be missing.

        It may be missing if the reply has reached a limit on tokens, if the request named texts at which the server
        stops, or if the server gave no finish reason.
        """
        return self.finish_reason in (None, "length") or self.has_stop_texts or self._has_room is False

    @property
    def may_have_cut_call(self) -> bool:
        """Whether the end of the last call may be missing.

        If a reply has a call, some servers report the finish reason of a complete reply, although the call was cut off
        at the limit on tokens. So a call counts as complete only if the reply is known to have fewer tokens than the
        limit.
        """
        return self.may_be_cut or self._has_room is None

    @property
    def _has_room(self) -> bool | None:
        """Whether the reply took fewer tokens than it was allowed to take; None if that is unknown."""
        tokens = (self.usage or {}).get("completion_tokens")
        return None if self.max_tokens is None or tokens is None else tokens < self.max_tokens

    def drop_cut_repetition(self) -> None:
        """Drops the last call if it was cut off and repeats the beginning of an earlier one.

        A small model that writes a call again and again does so until the limit. The earlier calls are complete, and
        nothing new was cut off, so they can be made. A call of which less than half was written is not dropped, because
        different calls often begin alike.
        """
        if len(self.calls) > 1 and self.has_cut_call:
            *earlier, last = (each["function"] for each in self.calls)
            if any(_is_beginning(last, each) for each in earlier):
                self.calls = self.calls[:-1]

    @property
    def has_cut_call(self) -> bool:
        """Whether the arguments of the last call were cut off at the limit on tokens."""
        if not self.calls or self.finish_reason != "length":
            return False
        arguments = self.calls[-1]["function"]["arguments"]
        try:
            msgspec.json.decode(arguments if isinstance(arguments, str) else msgspec.json.encode(arguments))
        except (ValueError, RecursionError):
            return True
        return arguments is None


def _is_beginning(cut: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Returns whether a call that was cut off is the beginning of another call, and has at least half of it."""
    one, other = cut["arguments"], whole["arguments"]
    is_text = isinstance(one, str) and isinstance(other, str)
    return is_text and cut["name"] == whole["name"] and other.startswith(one) and 2 * len(one) >= len(other)


def _read_calls(message: Mapping[str, Any]) -> Iterator[WireCall]:
    """Yields the calls in a message, each with a unique id.

    A call whose id is missing or already taken gets a new one, because some servers give all calls the same id. An
    entry that is not an object becomes a call without a name, so that the model reads what is wrong with it.
    """
    entries = message.get("tool_calls")
    entries = [each for each in entries if each is not None] if isinstance(entries, list) else []
    legacy = _as_object(message.get("function_call"))
    if not entries and (legacy.get("name") or legacy.get("arguments")):
        entries = [{"function": legacy}]
    taken: set[str] = set()
    for entry in map(_as_object, entries):
        function, call_id = _as_object(entry.get("function")), entry.get("id")
        call_id = str(call_id) if isinstance(call_id, (str, int)) else ""
        if not call_id or call_id in taken:
            call_id = generated_call_id()
        taken.add(call_id)
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(arguments, str):
            arguments = _read_arguments(arguments)
        read = {"name": name if isinstance(name, str) else "", "arguments": arguments}
        # The signature of Gemini's reasoning, which has to be sent back with the call.
        extra = {"extra_content": entry["extra_content"]} if entry.get("extra_content") else {}
        yield {"id": call_id, "type": "function", "function": read, **extra}


def _read_arguments(text: str) -> str:
    """Returns the arguments of a call. If the text consists of several copies of them, only the first is returned."""
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return without_repetition(text)
    return text


def _read_usage(completion: Mapping[str, Any]) -> Usage | None:
    """Returns the counts that are numbers, or None if none of them is.

    A server reports the tokens from its prompt cache as OpenAI does (`prompt_tokens_details`), or in `timings`, as
    older versions of llama.cpp do.
    """
    counts = _as_object(completion.get("usage"))
    counted: dict[str, Any] = {name: counts[name] for name in _COUNTS if isinstance(counts.get(name), int)}
    if not counted:
        return None
    details, timings = counts.get("prompt_tokens_details"), completion.get("timings")
    if details is not None or timings is not None:
        cached = _as_object(details).get("cached_tokens")
        cached = _as_object(timings).get("cache_n") if cached is None else cached
        if is_integer(cached):
            counted["prompt_tokens_details"] = {"cached_tokens": cached}
    return cast("Usage", counted)


def _as_object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
