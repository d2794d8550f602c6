"""The dicts of the wire, for editors and type checkers.

At run time they are plain dicts, exactly as the server sent them: no field is added, dropped or converted, and a
server may leave any of them out.
"""

from __future__ import annotations

from typing import Any, TypedDict


class FunctionCall(TypedDict, total=False):
    """What to call."""

    name: str
    arguments: str
    """JSON; in a chunk a piece of it."""


class ToolCall(TypedDict, total=False):
    """A call that the model asks for."""

    index: int
    """Only in chunks."""
    id: str
    type: str
    function: FunctionCall


class Message(TypedDict, total=False):
    """A message of a reply."""

    role: str
    content: str
    reasoning_content: str
    reasoning: str
    tool_calls: list[ToolCall]


class Delta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: str
    content: str | None
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall]


class Usage(TypedDict, total=False):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, Any]
    completion_tokens_details: dict[str, Any]


class Choice(TypedDict, total=False):
    """One of the answers of a plain reply."""

    index: int
    message: Message
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class ChunkChoice(TypedDict, total=False):
    """One of the answers, in a chunk."""

    index: int
    delta: Delta
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class ChatCompletion(TypedDict, total=False):
    """A plain reply of `/v1/chat/completions`."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None
    timings: dict[str, Any]


class ChatCompletionChunk(TypedDict, total=False):
    """One chunk of a streamed reply. `choices` may be empty (a chunk that carries the usage)."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None
    timings: dict[str, Any]
