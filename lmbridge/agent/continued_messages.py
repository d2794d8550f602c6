"""Reads the conversation that a run continues, and brings it into the form that all servers accept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from lmbridge.agent.tool_names import LONGEST_NAME
from lmbridge.client.content_parts import text_of_part
from lmbridge.client.input_checks import check_messages
from lmbridge.client.json_codec import encode_body
from lmbridge.errors import LLMValidationError

Message = dict[str, Any]
"""A message of a conversation, in the form in which it is sent."""

_UNSENDABLE: Final = re.compile(r"[^A-Za-z0-9_-]+")
"""Characters that the name in a call may not have. Servers would refuse every request that contains such a name.

Uppercase letters, which only some servers refuse, are converted to lowercase.
"""
_NAMELESS: Final = "unknown"
"""The name of a call whose own name has no character that may be sent."""
_PAIRS_HINT: Final = (
    "each call of an assistant message must be answered by a message with role 'tool' directly after it"
)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Message]]:
    """Returns the system prompt, and copies of the other messages in the form that all servers accept.

    Raises:
        LLMValidationError: The messages are not a valid conversation.
    """
    check_messages(messages)
    read: list[Message] = msgspec.json.decode(encode_body({"messages": messages}))["messages"]
    system = [text_of_part(each.get("content")) for each in read if each["role"] in ("system", "developer")]
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
        arguments = msgspec.json.encode(arguments).decode()
    if not isinstance(msgspec.json.decode(arguments), dict) or not function["name"] or not call["id"]:
        raise ValueError("not a tool call")
    sent = {"name": sendable_name(function["name"]), "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": sent, **call_signature(call)}


def check_pairs(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that every call has exactly one result, directly after its message.

    Raises:
        LLMValidationError: A result is missing, or belongs to no call.
    """
    # How many results the calls with each id still need. The keys are the `repr` of the ids, which may be any value.
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


def group_by_user_message(messages: list[Message]) -> list[list[Message]]:
    """Returns the messages in groups. Each group begins with a user message, except perhaps the first one."""
    groups: list[list[Message]] = []
    for message in messages:
        if not groups or message["role"] == "user":
            groups.append([])
        groups[-1].append(message)
    return groups


def sendable_name(name: str) -> str:
    """Returns the name of a call, or a similar one if servers would refuse it."""
    name = _UNSENDABLE.sub("_", name[: 2 * LONGEST_NAME])[:LONGEST_NAME].lower()
    return name if name.strip("_-") else _NAMELESS


def call_signature(call: Mapping[str, Any]) -> Message:
    """Returns the field with the signature of Gemini's reasoning, if a call has it. Gemini demands the field back."""
    return {"extra_content": call["extra_content"]} if call.get("extra_content") else {}
