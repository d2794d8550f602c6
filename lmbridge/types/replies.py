"""The replies of the endpoints, and the chunks and events of their streams.

The annotations are evaluated (there is no `from __future__ import annotations` here), because a TypedDict whose
annotations are strings does not know at run time which of its fields are required.
"""

from typing import Any, Required, TypedDict


class FunctionCall(TypedDict):
    """The function of a tool call."""

    name: str
    arguments: str
    """The arguments as JSON, exactly as the model wrote them."""


class MessageToolCall(TypedDict):
    """A tool call that the model asks for.

    Some servers leave out the id, the type or empty arguments of a call. lmbridge fills them in.
    """

    id: str
    type: str
    """Always "function" with local servers."""
    function: FunctionCall


class Message(TypedDict, total=False):
    """The message of a plain reply, or of a stream that was collected."""

    role: str
    content: Required[str | None]
    """The answer; None or empty if the model only called tools. lmbridge fills in None where a server sends nothing."""
    refusal: str | None
    """The model's words if it refused to answer in the form that was asked for."""
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[MessageToolCall]
    function_call: FunctionCall | None
    """The only call of a message, from servers that do not know `tool_calls` yet."""
    annotations: list[dict[str, Any]]
    """Sources of the answer, for example of a search."""
    audio: dict[str, Any] | None
    """The answer in sound."""


class FunctionCallDelta(TypedDict, total=False):
    """A piece of the function of a tool call."""

    name: str
    arguments: str
    """A piece of the arguments' JSON."""


class ToolCallDelta(TypedDict, total=False):
    """A piece of a tool call. `collect` joins the pieces."""

    index: int
    """The position of the call in the reply."""
    id: str
    type: str
    function: FunctionCallDelta


class Delta(TypedDict, total=False):
    """The piece that a chunk adds to the message."""

    role: str
    content: str | None
    refusal: str | None
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[ToolCallDelta]
    function_call: FunctionCallDelta | None
    annotations: list[dict[str, Any]]
    audio: dict[str, Any] | None


class Usage(TypedDict, total=False):
    """The numbers of tokens that a request has used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, Any]
    completion_tokens_details: dict[str, Any]


class RunUsage(TypedDict):
    """The tokens of an agent's run, or of one of its rounds. What the server did not count is 0."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionEnvelope(TypedDict, total=False):
    """What chat completions, text completions and their chunks have around their choices."""

    id: str
    object: str
    created: int
    model: str
    """The model that answered, in the server's words."""
    system_fingerprint: str | None
    usage: Usage | None
    """None in most chunks. Of a stream, it is sent only with `stream_options={"include_usage": True}`."""
    timings: dict[str, Any]
    """What llama.cpp measured."""


class Choice(TypedDict, total=False):
    """One choice of a plain reply; there are several with the parameter `n`."""

    index: int
    message: Required[Message]
    finish_reason: str | None
    """Why the model stopped: "stop", "length", "tool_calls", ... After `collect` it is always there."""
    logprobs: dict[str, Any] | None


class ChunkChoice(TypedDict, total=False):
    """A piece of one choice, in a chunk."""

    index: int
    delta: Required[Delta]
    """What the chunk adds; empty if it adds nothing. lmbridge fills in an empty one where a server sends none."""
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class ChatCompletion(CompletionEnvelope):
    """A plain reply of `/v1/chat/completions`."""

    choices: list[Choice]


class ChatCompletionChunk(CompletionEnvelope):
    """One chunk of a streamed reply, as the server sent it.

    `choices` is empty in a chunk that carries only the usage. lmbridge fills in an empty list if a server sends none.
    """

    choices: list[ChunkChoice]


# Text completions


class TextChoice(TypedDict, total=False):
    """One choice of a text completion; in a chunk, a piece of it."""

    index: int
    text: Required[str]
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class TextCompletion(CompletionEnvelope):
    """A plain reply of `/v1/completions`."""

    choices: list[TextChoice]


class TextCompletionChunk(CompletionEnvelope):
    """One chunk of a streamed text completion. `choices` is empty in a chunk that carries only the usage."""

    choices: list[TextChoice]


# Embeddings


class Embedding(TypedDict, total=False):
    """The embedding of one input."""

    index: Required[int]
    object: str
    embedding: Required[Any]
    """A list of numbers; with `encoding_format="base64"` a string; for a model without pooling, one list per token."""


class Embeddings(TypedDict, total=False):
    """A reply of `/v1/embeddings`, in the order of the inputs."""

    object: str
    model: str
    data: Required[list[Embedding]]
    usage: Usage | None


# Responses


class ResponsePart(TypedDict, total=False):
    """A part of the content of an item, or of its summary."""

    type: str
    """For example "output_text", "refusal", "reasoning_text" or "summary_text"."""
    text: str
    refusal: str
    annotations: list[dict[str, Any]]
    logprobs: list[dict[str, Any]]


class ResponseItem(TypedDict, total=False):
    """One item of a response: a message, the model's reasoning, or a function call."""

    type: str
    """For example "message", "reasoning" or "function_call"."""
    id: str
    status: str
    role: str
    content: list[ResponsePart]
    summary: list[ResponsePart]
    call_id: str
    name: str
    arguments: str
    """The arguments of a function call as JSON."""


class ResponseUsage(TypedDict, total=False):
    """The numbers of tokens that a response has used."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, Any]
    output_tokens_details: dict[str, Any]


class Response(TypedDict, total=False):
    """A plain reply of `/v1/responses`."""

    id: str
    """The name of the response, for `previous_response_id`."""
    object: str
    created_at: float
    completed_at: float | None
    model: str
    status: str
    """For example "completed", or "incomplete", which `incomplete_details` explains."""
    output: Required[list[ResponseItem]]
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None


class ResponseEventData(TypedDict, total=False):
    """The data of one event of a streamed response. Its `type` determines which fields it has."""

    type: str
    sequence_number: int
    response: Response
    item: ResponseItem
    item_id: str
    output_index: int
    part: ResponsePart
    content_index: int
    summary_index: int
    delta: str
    text: str
    arguments: str
