"""The fields that every chat completion has in lmbridge, filled in where a server leaves them out.

A program that reads `reply["choices"][0]["message"]["content"]` is right by OpenAI's API, and fails with servers that
leave `content` out of a message that only calls tools. The types of a reply could say that any field may be missing,
but then every program would have to expect what hardly ever happens. So these few fields are guaranteed, and the types
say so. What a server did send is never changed.
"""

from __future__ import annotations

from typing import Any

from lmbridge.client.tool_call_accumulator import generated_call_id


def complete_chat_reply(value: dict[str, Any]) -> bool:
    """Fills in the missing fields of a plain reply; returns whether it is a chat completion at all."""
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(message := choice.get("message"), dict):
            return False
        message.setdefault("content", None)
        for call in message.get("tool_calls") or ():
            _complete_call(call)
    return True


def complete_choices(chunk: dict[str, Any], field: str, empty: type[dict[str, Any] | str]) -> None:
    """Fills in the missing fields of a chunk: its `choices`, and what each of them adds.

    Args:
        chunk: A chunk whose shape an accumulator has accepted.
        field: The field of a choice that holds what it adds: "delta" or "text".
        empty: The type of that field.
    """
    if not chunk.get("choices"):
        chunk["choices"] = []
    for choice in chunk["choices"]:
        if not choice.get(field):
            choice[field] = empty()


def _complete_call(call: object) -> None:
    # Calls of other types belong to tools that only OpenAI has, and have no function.
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        return
    if not call.get("id"):
        call["id"] = generated_call_id()
    call.setdefault("type", "function")
    function = call.setdefault("function", {})
    if isinstance(function, dict):
        function.setdefault("name", "")
        function.setdefault("arguments", "")
