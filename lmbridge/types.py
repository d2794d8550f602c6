"""The dicts that servers send, described for editors and type checkers.

At run time these are plain dicts, exactly as the server sent them: no field is added, dropped or converted. TypedDicts
won over classes because of that promise, and because a server may leave out any field and send others.
"""

from __future__ import annotations

from typing import Any, TypedDict


class FunctionCall(TypedDict, total=False):
    """The function of a tool call."""

    name: str
    arguments: str
    """The arguments as JSON; in a chunk, a piece of that JSON."""


class ToolCall(TypedDict, total=False):
    """A tool call that the model asks for."""

    index: int
    """The position of the call in the reply. Only chunks have it."""
    id: str
    type: str
    function: FunctionCall


class Message(TypedDict, total=False):
    """The message of a plain reply."""

    role: str
    content: str
    reasoning_content: str
    reasoning: str
    tool_calls: list[ToolCall]


class Delta(TypedDict, total=False):
    """The piece that a chunk adds to the message."""

    role: str
    content: str | None
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall]


class Usage(TypedDict, total=False):
    """The numbers of tokens that a request has used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, Any]
    completion_tokens_details: dict[str, Any]


class Choice(TypedDict, total=False):
    """One choice of a plain reply; there are several with the parameter `n`."""

    index: int
    message: Message
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class ChunkChoice(TypedDict, total=False):
    """A piece of one choice, in a chunk."""

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
    """One chunk of a streamed reply. `choices` is empty in a chunk that carries only the usage."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None
    timings: dict[str, Any]


class LMStudioInstance(TypedDict, total=False):
    """A loaded instance of one of LM Studio's models."""

    id: str
    config: dict[str, Any]
    """The configuration: `context_length`; for a language model also `parallel`, `eval_batch_size`, ..."""


class LMStudioModel(TypedDict, total=False):
    """One of LM Studio's downloaded models (`/api/v1/models`)."""

    type: str
    """Either "llm" or "embedding"."""
    key: str
    """The name by which the model is loaded."""
    publisher: str
    display_name: str
    architecture: str | None
    quantization: dict[str, Any] | None
    size_bytes: int
    params_string: str | None
    loaded_instances: list[LMStudioInstance]
    max_context_length: int
    """The longest context that the model supports. That of a loaded instance is in its `config`."""
    format: str | None
    capabilities: dict[str, Any]
    description: str | None
    variants: list[str]
    selected_variant: str


class LMStudioLoad(TypedDict, total=False):
    """LM Studio's answer after it has loaded a model."""

    type: str
    instance_id: str
    load_time_seconds: float
    status: str
    load_config: dict[str, Any]
    """The whole configuration. It is sent only if the request had `echo_load_config`."""


class LMStudioUnload(TypedDict, total=False):
    """LM Studio's answer after it has unloaded an instance."""

    instance_id: str


class DownloadStatus(TypedDict, total=False):
    """The progress of one of LM Studio's downloads."""

    job_id: str
    status: str
    """One of "downloading", "paused", "completed", "failed" and "already_downloaded"."""
    total_size_bytes: int
    downloaded_bytes: int
    bytes_per_second: float
    started_at: str
    estimated_completion: str
    completed_at: str


# Text completions


class TextChoice(TypedDict, total=False):
    """One choice of a text completion; in a chunk, a piece of it."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class TextCompletion(TypedDict, total=False):
    """A plain reply of `/v1/completions`."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None
    timings: dict[str, Any]


class TextCompletionChunk(TypedDict, total=False):
    """One chunk of a streamed text completion. `choices` is empty in a chunk that carries only the usage."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None
    timings: dict[str, Any]


# Embeddings


class Embedding(TypedDict, total=False):
    """The embedding of one input."""

    index: int
    object: str
    embedding: Any
    """A list of numbers; with `encoding_format="base64"` a string; for a model without pooling, one list per token."""


class Embeddings(TypedDict, total=False):
    """A reply of `/v1/embeddings`, in the order of the inputs."""

    object: str
    model: str
    data: list[Embedding]
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
    output: list[ResponseItem]
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
