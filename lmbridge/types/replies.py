"""The replies of the endpoints, and the chunks and events of their streams.

The annotations are evaluated (there is no `from __future__ import annotations` here), because a TypedDict whose
annotations are strings does not know at run time which of its fields are required.
"""

from typing import Any, NotRequired, Required, TypedDict


class FunctionCall(TypedDict):
    """The function of a tool call."""

    name: str
    """The name of the function."""
    arguments: str
    """The arguments as JSON, exactly as the model wrote them."""


class MessageToolCall(TypedDict):
    """A tool call that the model requests.

    Some servers leave out the id, the type or empty arguments of a call. lmbridge fills them in.
    """

    id: str
    """The id of the call, which the message with its result repeats as `tool_call_id`."""
    type: str
    """The kind of tool, which is "function" with local servers."""
    function: FunctionCall
    """The function to call, and its arguments."""


class Message(TypedDict, total=False):
    """The message of a plain reply, or of a stream that was collected."""

    role: str
    """The role of the author, which is "assistant" in replies."""
    content: Required[str | None]
    """The answer; None or empty if the model only called tools. If a server leaves the field out, lmbridge fills in
    None. If a server sends a list of parts, lmbridge joins their texts."""
    refusal: str | None
    """The model's words if it refused to answer in the requested form."""
    reasoning_content: str | None
    """The model's reasoning, as llama.cpp, LM Studio and vLLM name the field."""
    reasoning: str | None
    """The model's reasoning, as Ollama and some other servers name the field."""
    tool_calls: list[MessageToolCall]
    """The tool calls that the model requests. The field is missing if it requests none."""
    function_call: FunctionCall | None
    """The only call of a message, from servers that do not know `tool_calls` yet."""
    annotations: list[dict[str, Any]]
    """Sources of the answer, for example the results of a search."""
    audio: dict[str, Any] | None
    """The answer as audio."""


class FunctionCallDelta(TypedDict, total=False):
    """A piece of the function of a tool call."""

    name: str
    """The name of the function, which most servers send whole in the first piece."""
    arguments: str
    """A piece of the arguments as JSON. Joined in order, the pieces are the whole text."""


class ToolCallDelta(TypedDict, total=False):
    """A piece of a tool call. `collect` joins the pieces."""

    index: int
    """The position of the call in the reply."""
    id: str
    """The id of the call, which is sent with its first piece."""
    type: str
    """The kind of tool, which is "function" with local servers."""
    function: FunctionCallDelta
    """The piece of the function that this chunk adds."""


class Delta(TypedDict, total=False):
    """The piece that a chunk adds to the message."""

    role: str
    """The role of the author, which is "assistant" in replies."""
    content: str | None
    """The next piece of the answer; None or empty if this chunk adds nothing to it."""
    refusal: str | None
    """The next piece of a refusal."""
    reasoning_content: str | None
    """The next piece of the reasoning, as llama.cpp, LM Studio and vLLM name the field."""
    reasoning: str | None
    """The next piece of the reasoning, as Ollama and some other servers name the field."""
    tool_calls: list[ToolCallDelta]
    """Pieces of tool calls, each with the position of its call."""
    function_call: FunctionCallDelta | None
    """A piece of the only call, from servers that do not know `tool_calls` yet."""
    annotations: list[dict[str, Any]]
    """Sources of the answer, for example the results of a search."""
    audio: dict[str, Any] | None
    """A piece of the answer as audio."""


class Usage(TypedDict, total=False):
    """The numbers of tokens that a request has used."""

    prompt_tokens: int
    """The number of tokens in the prompt."""
    completion_tokens: int
    """The number of tokens that the model generated, those of its reasoning included."""
    total_tokens: int
    """The sum of both."""
    prompt_tokens_details: dict[str, Any]
    """A breakdown of the prompt's tokens, such as how many of them were cached."""
    completion_tokens_details: dict[str, Any]
    """A breakdown of the generated tokens, such as how many were reasoning."""


class RunUsage(TypedDict):
    """The tokens of an agent's run, or of one of its rounds. A number that the server does not report is 0."""

    prompt_tokens: int
    """The number of tokens in the prompts of all requests."""
    completion_tokens: int
    """The number of tokens that the model generated."""
    total_tokens: int
    """The sum of both."""
    cached: NotRequired[int]
    """How many tokens of the prompts came from the server's cache, so that they were not evaluated again. The field is
    missing if the server does not report it."""


class CompletionEnvelope(TypedDict, total=False):
    """The fields that chat completions, text completions and their chunks have in addition to their choices."""

    id: str
    """The id that the server gave the reply. All chunks of a stream have the same one."""
    object: str
    """The kind of object, as OpenAI's API names it."""
    created: int
    """The time of the reply, in seconds since 1970."""
    model: str
    """The model that answered, as the server names it."""
    system_fingerprint: str | None
    """A name for the version of the server and its settings."""
    usage: Usage | None
    """The numbers of tokens; None in most chunks. A stream has them only if the request had
    `stream_options={"include_usage": True}`."""
    timings: dict[str, Any]
    """What llama.cpp measured, such as the tokens per second."""


class ChatChoice(TypedDict, total=False):
    """One choice of a plain reply; there are several with the parameter `n`."""

    index: int
    """The position of this choice among those of the reply; the first one is 0."""
    message: Required[Message]
    """The message that the model wrote."""
    finish_reason: str | None
    """Why the model stopped, such as "stop", "length" or "tool_calls". After `collect`, the field is always present."""
    logprobs: dict[str, Any] | None
    """The log probabilities of the tokens; None if the request did not ask for them."""


class ChunkChoice(TypedDict, total=False):
    """A piece of one choice, in a chunk."""

    index: int
    """The position of the choice that this piece belongs to; the first one is 0."""
    delta: Required[Delta]
    """What the chunk adds; empty if it adds nothing. If a server sends no delta, lmbridge fills in an empty one."""
    finish_reason: str | None
    """Why the model stopped, such as "stop", "length" or "tool_calls"; None while it goes on."""
    logprobs: dict[str, Any] | None
    """The log probabilities of the tokens; None if the request did not ask for them."""


class ChatCompletion(CompletionEnvelope):
    """A plain reply of `/v1/chat/completions`."""

    choices: list[ChatChoice]
    """The answers, of which there is at least one."""


class ChatCompletionChunk(CompletionEnvelope):
    """One chunk of a streamed reply, as the server sent it.

    `choices` is empty in a chunk that carries only the usage. lmbridge fills in an empty list if a server sends none.
    """

    choices: list[ChunkChoice]
    """The pieces of the answers; the list is empty in a chunk that has only the usage."""


# Text completions


class TextChoice(TypedDict, total=False):
    """One choice of a text completion; in a chunk, a piece of it."""

    index: int
    """The position of this choice among those of the reply; the first one is 0."""
    text: Required[str]
    """The text that continues the prompt; in a chunk, the next piece of it."""
    finish_reason: str | None
    """Why the model stopped, such as "stop" or "length"; None while it goes on."""
    logprobs: dict[str, Any] | None
    """The log probabilities of the tokens; None if the request did not ask for them."""


class TextCompletion(CompletionEnvelope):
    """A plain reply of `/v1/completions`."""

    choices: list[TextChoice]
    """The answers, `n` for each prompt."""


class TextCompletionChunk(CompletionEnvelope):
    """One chunk of a streamed text completion. `choices` is empty in a chunk that carries only the usage."""

    choices: list[TextChoice]
    """The pieces of the answers; the list is empty in a chunk that has only the usage."""


# Embeddings


class Embedding(TypedDict, total=False):
    """The embedding of one input."""

    index: Required[int]
    """The position of the embedded input among the inputs; the first one is 0."""
    object: str
    """The kind of object, as OpenAI's API names it."""
    embedding: Required[Any]
    """The vector: a list of numbers, or a string with `encoding_format="base64"`, or one list for each token if the
    model has no pooling."""


class Embeddings(TypedDict, total=False):
    """A reply of `/v1/embeddings`, in the order of the inputs."""

    object: str
    """The kind of object, as OpenAI's API names it."""
    model: str
    """The model that answered, as the server names it."""
    data: Required[list[Embedding]]
    """The embeddings, one for each input."""
    usage: Usage | None
    """The numbers of tokens; None if the server does not count them."""


# Responses


class ResponsePart(TypedDict, total=False):
    """A part of the content of an item, or of its summary."""

    type: str
    """The kind of part, such as "output_text", "refusal", "reasoning_text" or "summary_text"."""
    text: str
    """The text of the part."""
    refusal: str
    """The model's words, in a part of the type "refusal"."""
    annotations: list[dict[str, Any]]
    """Sources of the text, for example the results of a search."""
    logprobs: list[dict[str, Any]]
    """The log probabilities of the tokens, if the request asked for them."""


class ResponseItem(TypedDict, total=False):
    """One item of a response: a message, the model's reasoning, or a function call."""

    type: str
    """The kind of item, such as "message", "reasoning" or "function_call"."""
    id: str
    """The id of the item."""
    status: str
    """Whether the item is complete: "in_progress", "completed" or "incomplete"."""
    role: str
    """The role of a message, which is "assistant" in replies."""
    content: list[ResponsePart]
    """The parts of a message, or of the reasoning."""
    summary: list[ResponsePart]
    """The parts of a summary of the reasoning."""
    call_id: str
    """The id of a function call, which the item with its result repeats."""
    name: str
    """The name of the function that is called."""
    arguments: str
    """The arguments of a function call as JSON."""


class ResponseUsage(TypedDict, total=False):
    """The numbers of tokens that a response has used."""

    input_tokens: int
    """The number of tokens in the prompt."""
    output_tokens: int
    """The number of tokens that the model generated, those of its reasoning included."""
    total_tokens: int
    """The sum of both."""
    input_tokens_details: dict[str, Any]
    """A breakdown of the prompt's tokens, such as how many of them were cached."""
    output_tokens_details: dict[str, Any]
    """A breakdown of the generated tokens, such as how many were reasoning."""


class Response(TypedDict, total=False):
    """A plain reply of `/v1/responses`."""

    id: str
    """The id of the response, which a later request can name as its `previous_response_id`."""
    object: str
    """The kind of object, as OpenAI's API names it."""
    created_at: float
    """The time at which the server began the response, in seconds since 1970."""
    completed_at: float | None
    """The time at which the response was complete, in seconds since 1970; None before that."""
    model: str
    """The model that answered, as the server names it."""
    status: str
    """The state of the response: "completed", or "incomplete", which `incomplete_details` explains."""
    output: Required[list[ResponseItem]]
    """The items of the response, in the order in which the model wrote them."""
    usage: ResponseUsage | None
    """The numbers of tokens; None if the server does not count them."""
    error: dict[str, Any] | None
    """What went wrong; None in a response that did not fail."""
    incomplete_details: dict[str, Any] | None
    """Why the response is incomplete, such as `{"reason": "max_output_tokens"}`; otherwise None."""
    previous_response_id: str | None
    """The id of the response that this one continues; None if it continues none."""


class ResponseEventData(TypedDict, total=False):
    """The data of one event of a streamed response. Its `type` determines which fields it has."""

    type: str
    """The kind of event, such as "response.output_text.delta"."""
    sequence_number: int
    """The number of the event in its stream."""
    response: Response
    """The response so far, in events about the response as a whole."""
    item: ResponseItem
    """The item that was added or is done."""
    item_id: str
    """The id of the item that the event is about."""
    output_index: int
    """The position of the item in `output`."""
    part: ResponsePart
    """The part that was added or is done."""
    content_index: int
    """The position of the part in the `content` of the item."""
    summary_index: int
    """The position of the part in the `summary` of the item."""
    delta: str
    """The next piece of a text, or of the arguments of a function call."""
    text: str
    """The whole text, in the event that ends it."""
    arguments: str
    """The whole arguments of a function call as JSON, in the event that ends them."""
