"""The shape that every chat and text completion has in lmbridge, whatever a server sends.

According to OpenAI's API, a program may read `reply["choices"][0]["message"]["content"]`, or
`choice["delta"].get("content")`. But it would fail with servers that leave `content` out of a message that only calls
tools, and with proxies that send `"choices": null` to keep the connection alive. The types of a reply could say that
any field may be missing, but then every program would have to handle what hardly ever happens. So these few fields are
guaranteed, and the types say so: what is missing or null is filled in, choices that are not objects are left out,
content that consists of parts is replaced by its text, and indices, finish reasons and arguments of calls that have
another form are converted. Nothing else that a server sends is changed, and a value of the wrong kind is an error.

Whether a completion is whole is not decided here, but in `client.reply_stream`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping
from typing import Any, Final, Literal

from lmbridge._checks import MAPPING_TYPES, is_integer
from lmbridge.client.content_parts import (
    consists_of_parts,
    flatten_content,
    flatten_in_slices,
    text_in_slices,
    text_of_part,
)
from lmbridge.client.tool_call_accumulator import arguments_text, generated_call_id
from lmbridge.errors import LLMResponseError

logger: logging.Logger = logging.getLogger("lmbridge.client")

_BROKEN_REASONS: Final = frozenset({"abort", "aborted", "cancelled", "canceled", "error", "failed"})
"""Finish reasons of an answer that the server has not finished, in lower case: those of vLLM, SGLang and koboldcpp, in
their spellings. An unknown reason is accepted, because servers invent new ones."""
_MAX_INDEX_DIGITS: Final = 9
"""The length up to which a string is read as an index."""
_EMPTY_VALUES: Final = ("", False, 0)
"""The values besides null, empty lists and empty dicts that servers send in place of choices or a delta."""


# Plain replies


def complete_chat_reply(value: dict[str, Any]) -> bool:
    """Fills in the missing fields of a plain reply; returns whether it is a chat completion at all."""
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    return all(isinstance(choice, dict) and _complete_message(choice) for choice in choices)


def complete_text_reply(value: dict[str, Any]) -> bool:
    """Fills in the missing fields of a plain text completion; returns whether it is one at all."""
    choices = value.get("choices")
    return isinstance(choices, list) and all(isinstance(choice, dict) and _complete_text(choice) for choice in choices)


def _complete_text(choice: dict[str, Any]) -> bool:
    text = choice.get("text")
    if isinstance(text, list | Mapping) or (text is None and _error_of(choice)):
        choice["text"] = text_of_part(text)
    return isinstance(choice.get("text"), str)


def _complete_message(choice: dict[str, Any]) -> bool:
    message: Any = choice.get("message")
    if message is None and _error_of(choice):
        # OpenRouter sends an error in place of the message.
        message = choice["message"] = {"role": "assistant"}
    if not isinstance(message, dict):
        return False
    flatten_content(message)
    content = message.setdefault("content", None)
    if content is not None and not isinstance(content, str):
        return False
    if isinstance(calls := message.get("tool_calls"), dict):
        calls = message["tool_calls"] = [calls]
    return calls is None or (isinstance(calls, list) and all(map(_complete_call, calls)))


def _complete_call(call: object) -> bool:
    """Fills in the missing fields of a call; returns whether it is a call at all."""
    if not isinstance(call, dict):
        return False
    function = call.get("function")
    # The fast path, because there may be thousands of calls.
    if type(function) is dict and type(function.get("name")) is str and type(function.get("arguments")) is str:
        call_id = call.get("id")
        if call_id and type(call_id) is str and call.get("type") == "function":
            return True
    # Calls of other types belong to tools that only OpenAI has, and have no function.
    if not call.get("type"):
        call["type"] = "function"
    if call["type"] != "function":
        return True
    if not call.get("id"):
        call["id"] = generated_call_id()
    elif not isinstance(call["id"], str | int):
        return False
    function = function or {}
    if not isinstance(function, dict):
        return False
    call["function"] = function
    if isinstance(arguments := function.get("arguments"), dict | list):
        function["arguments"] = arguments_text(arguments)
    for key in ("name", "arguments"):
        if function.get(key) is None:
            function[key] = ""
    return True


# Chunks


def complete_chunk(chunk: Mapping[str, Any], field: Literal["delta", "text"]) -> Mapping[str, Any]:
    """Returns a chunk with the fields that lmbridge guarantees: the chunk itself if it has them, or a changed copy.

    Args:
        chunk: The chunk.
        field: The field of a choice that holds the piece of the answer: "delta" for a chat completion, "text" for a
            text completion.

    Raises:
        TypeError, ValueError, AttributeError: The chunk holds something of the wrong kind, which cannot be ignored.
    """
    choices = chunk.get("choices")
    is_complete = _has_complete_delta if field == "delta" else _has_complete_text
    if type(choices) is list and all(map(is_complete, choices)):
        return chunk
    return {**chunk, "choices": _complete_choices(choices, field)}


def flatten_choice_in_slices(choice: Any, field: Literal["delta", "text"]) -> Generator[None, None, Any]:
    """Returns a choice of a chunk with its text in place of parts, as a generator that yields after every 100 parts."""
    added = choice.get(field) if isinstance(choice, Mapping) else None
    if field == "text" and added and consists_of_parts(added):
        return {**choice, "text": (yield from text_in_slices(added))}
    if field == "delta" and isinstance(added, Mapping) and consists_of_parts(added.get("content")):
        delta = dict(added)
        yield from flatten_in_slices(delta)
        return {**choice, "delta": delta}
    return choice


def _has_complete_delta(choice: Any) -> bool:
    if type(choice) is not dict or type(delta := choice.get("delta")) is not dict:
        return False
    content = delta.get("content")
    return (content is None or isinstance(content, str)) and _has_plain_fields(choice)


def _has_complete_text(choice: Any) -> bool:
    return type(choice) is dict and type(choice.get("text")) is str and _has_plain_fields(choice)


def _has_plain_fields(choice: dict[str, Any]) -> bool:
    index, reason = choice.get("index"), choice.get("finish_reason")
    return (index is None or (type(index) is int and index >= 0)) and (reason is None or type(reason) is str)


def _complete_choices(choices: object, field: Literal["delta", "text"]) -> list[dict[str, Any]]:
    if _is_nothing(choices):
        return []
    if not isinstance(choices, list | tuple):
        raise TypeError("the choices are not a list")
    if skipped := [choice for choice in choices if not isinstance(choice, Mapping)]:
        logger.debug("skipped %d choices of a chunk that are not objects", len(skipped))
    return [_complete_choice(choice, field) for choice in choices if isinstance(choice, Mapping)]


def _complete_choice(choice: Mapping[str, Any], field: Literal["delta", "text"]) -> dict[str, Any]:
    completed = dict(choice)
    added = choice.get(field)
    if field == "text":
        completed["text"] = _text_from(added)
    elif _is_nothing(added):
        completed["delta"] = {}
    elif isinstance(added, Mapping):
        completed["delta"] = delta = dict(added)
        flatten_content(delta)
    else:
        raise TypeError("the delta is not an object")
    if choice.get("index") is not None:
        completed["index"] = _index_from(choice["index"])
    if isinstance(reason := choice.get("finish_reason"), Mapping):
        # SGLang's own form: {"type": "abort", "message": "..."}.
        completed["finish_reason"] = str(reason.get("type") or "") or None
        if reason.get("message") and is_broken_reason(completed["finish_reason"]):
            completed.setdefault("error", reason)
    elif reason is not None and not isinstance(reason, str):
        raise TypeError("the finish reason is not a string")
    return completed


def _is_nothing(value: object) -> bool:
    return value is None or value in _EMPTY_VALUES or (isinstance(value, list | tuple | Mapping) and not value)


def _text_from(value: object) -> str:
    if value is not None and not isinstance(value, str | list | tuple | Mapping):
        raise TypeError("the text is not a string")
    return text_of_part(value)


def read_index(value: object) -> int | None:
    """Returns an index, which some servers send as a string or as a float, or None if the value is anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isdecimal() and len(value) <= _MAX_INDEX_DIGITS:
        return int(value)
    return value if is_integer(value) else None


def _index_from(value: Any) -> int:
    """Returns the index of a choice.

    Raises:
        TypeError, ValueError: It is not an index, or negative.
    """
    index = read_index(value)
    if index is None:
        raise TypeError("the index of a choice is not a number")
    if index < 0:
        raise ValueError("the index of a choice is negative")
    return index


# Answers that the server has not finished


def error_in_choice(choice: Mapping[str, Any]) -> str | None:
    """Returns the error object that a proxy has put into a choice, as the JSON of an error body, or None."""
    error = _error_of(choice)
    return json.dumps({"error": error}) if error else None


def aborted_error(choice: Mapping[str, Any]) -> LLMResponseError | None:
    """Returns the error for a finish reason that says that the server has broken off the answer, or None."""
    reason = choice.get("finish_reason")
    if not is_broken_reason(reason):
        return None
    return LLMResponseError(
        f"the server aborted the answer, with the finish reason {reason!r}",
        hint="check the server's log; what had arrived is in .partial",
    )


def is_broken_reason(reason: object) -> bool:
    """Returns whether a finish reason, or the status of a response, says that the server has broken the answer off."""
    return isinstance(reason, str) and reason.lower() in _BROKEN_REASONS


def _error_of(choice: Mapping[str, Any]) -> object:
    if error := choice.get("error"):
        return error
    for holder in (choice.get("delta"), choice.get("message")):
        if holder is not None and isinstance(holder, MAPPING_TYPES) and (error := holder.get("error")):
            return error
    return None
