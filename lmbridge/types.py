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


class LMStudioInstance(TypedDict, total=False):
    """A loaded instance of one of LM Studio's models."""

    id: str
    config: dict[str, Any]
    """`context_length` and, of a language model, `parallel`, `eval_batch_size`, `flash_attention`, ..."""


class LMStudioModel(TypedDict, total=False):
    """One of LM Studio's downloaded models (`/api/v1/models`)."""

    type: str
    """"llm" or "embedding"."""
    key: str
    """What to load it by."""
    publisher: str
    display_name: str
    architecture: str | None
    quantization: dict[str, Any] | None
    size_bytes: int
    params_string: str | None
    loaded_instances: list[LMStudioInstance]
    max_context_length: int
    """What the model can do; what an instance of it does is in its `config`."""
    format: str | None
    capabilities: dict[str, Any]
    description: str | None
    variants: list[str]
    selected_variant: str


class LMStudioLoad(TypedDict, total=False):
    """What LM Studio says of a model that it has loaded."""

    type: str
    instance_id: str
    load_time_seconds: float
    status: str
    load_config: dict[str, Any]
    """Only if `echo_load_config` was sent."""


class LMStudioUnload(TypedDict, total=False):
    """What LM Studio says of an instance that it has unloaded."""

    instance_id: str


class DownloadStatus(TypedDict, total=False):
    """How far one of LM Studio's downloads is."""

    job_id: str
    status: str
    """"downloading", "paused", "completed", "failed" or "already_downloaded"."""
    total_size_bytes: int
    downloaded_bytes: int
    bytes_per_second: float
    started_at: str
    estimated_completion: str
    completed_at: str


# Text completions


class TextChoice(TypedDict, total=False):
    """One of the answers of a text completion; in a chunk a piece of it."""

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
    """One chunk of a streamed text completion. `choices` may be empty (a chunk that carries the usage)."""

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
    """The embedding of one of the inputs."""

    index: int
    object: str
    embedding: Any
    """A list of numbers; a string with `encoding_format="base64"`; of a model without pooling a list for each token."""


class Embeddings(TypedDict, total=False):
    """A reply of `/v1/embeddings`, in the order of the inputs."""

    object: str
    model: str
    data: list[Embedding]
    usage: Usage | None


# Responses


class ResponsePart(TypedDict, total=False):
    """A part of an item's content, or of its summary."""

    type: str
    """"output_text", "refusal", "reasoning_text", "summary_text"."""
    text: str
    refusal: str
    annotations: list[dict[str, Any]]
    logprobs: list[dict[str, Any]]


class ResponseItem(TypedDict, total=False):
    """Something that the model put out: a message, its reasoning, a function call."""

    type: str
    """"message", "reasoning", "function_call", ..."""
    id: str
    status: str
    role: str
    content: list[ResponsePart]
    summary: list[ResponsePart]
    call_id: str
    name: str
    arguments: str
    """JSON."""


class ResponseUsage(TypedDict, total=False):
    """Tokens."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, Any]
    output_tokens_details: dict[str, Any]


class Response(TypedDict, total=False):
    """A plain reply of `/v1/responses`."""

    id: str
    """For `previous_response_id`."""
    object: str
    created_at: float
    completed_at: float | None
    model: str
    status: str
    """"completed", or "incomplete": see `incomplete_details`."""
    output: list[ResponseItem]
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None


class ResponseEventData(TypedDict, total=False):
    """What an event of a streamed response holds; which fields, its `type` says."""

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
