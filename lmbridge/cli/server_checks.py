"""The checks of `lmbridge doctor` on a server: each tries one thing that programs rely on.

A check returns a finding. If a check raises an error, the feature that it tries does not work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import attrs

from lmbridge._tasks import end_task
from lmbridge.cli.connection import ServerConnection, only_embeds
from lmbridge.cli.findings import Finding
from lmbridge.client import ChatStream
from lmbridge.client.reasoning import ReasoningSplitter
from lmbridge.client.server_info import ModelInfo
from lmbridge.config import Limits
from lmbridge.errors import ContextLengthExceededError, LLMError, LLMValidationError

Check = Callable[[ServerConnection], Awaitable[Finding]]
"""A check of a server."""

_LONG_QUESTION: Final = "Count from 1 to 1000, one number after the other."
_WORD_OF_THE_DAY: Final = "blue-tulip"
_LONGEST_PROBE: Final = 40_000
"""The longest context, in tokens, that is filled to see what happens beyond it."""
_LONG_ANSWER: Final = 400
"""The maximum number of tokens of an answer whose stream is closed after the first few of them."""
_JITTER_SECONDS: Final = 1.0
"""How many seconds longer one short answer may take than another, even if the server has stopped all generations."""
_READ_TOKENS: Final = 5
"""How many tokens are read before a stream is closed, to measure how fast the model writes."""
_SWITCH_FIX: Final = 'let lmbridge schedule the requests: limits="auto", or `lmbridge gateway` for all programs'

_now: Final = time.monotonic


def _question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def check_model(connection: ServerConnection) -> Finding:
    """Checks whether there is a model, and whether it is loaded."""
    info = connection.info
    if info.kind == "unknown" and not info.models:
        fix = "if the server needs the name of a model, give it with --model"
        return Finding("model", "warning", "the server does not list its models", fix)
    if all(only_embeds(each) for each in info.models):
        return Finding("model", "broken", "the server has no model that can chat", "load or download a model")
    loaded = info.loaded_models
    if loaded is None:
        return Finding("model", "ok", f"{connection.model} (the server does not say whether it is loaded)")
    if not loaded:
        fix = f"load one first if that is too slow: lmbridge models load {connection.model}"
        return Finding("model", "warning", f"no model is loaded; {connection.model} is loaded on demand", fix)
    context = connection.context_length
    return Finding("model", "ok", f"{connection.model} is loaded" + (f", context {context}" if context else ""))


async def check_streaming(connection: ServerConnection) -> Finding:
    """Checks whether an answer arrives in pieces, with a proper end and the token usage."""
    pieces, splitter = 0, ReasoningSplitter()
    params: dict[str, Any] = {"max_tokens": 30, "stream_options": {"include_usage": True}}
    async with connection.client.stream_chat(_question(_LONG_QUESTION), **params) as stream:
        async for chunk in stream:
            pieces += bool(splitter.feed(chunk))
        reply = stream.partial
    if pieces < 3:
        fix = "look for a proxy in front of the server that buffers the answer"
        return Finding("streaming", "warning", f"the answer arrived in {pieces} pieces", fix)
    if reply is None or not reply.get("usage"):
        return Finding("streaming", "ok", f"{pieces} pieces; the server does not count tokens in streams")
    return Finding("streaming", "ok", f"{pieces} pieces, a proper end, and the token usage")


async def check_cancelling(connection: ServerConnection) -> Finding:
    """Checks whether the server stops generating when streams are closed, so that its slots are free again soon."""

    async def seconds_of_short_answer() -> float:
        started = _now()
        await connection.client.chat_completion(_question("Say hi."), max_tokens=1)
        return _now() - started

    async def leave_a_stream() -> float | None:
        """Returns the seconds that a long answer would have taken, or None if the answer ended too early."""
        question = _question(_LONG_QUESTION)
        async with connection.client.stream_chat(question, max_tokens=_LONG_ANSWER) as stream:
            await anext(stream)
            started = _now()
            for _ in range(_READ_TOKENS):
                if await anext(stream, None) is None:
                    return None
            return (_now() - started) / _READ_TOKENS * _LONG_ANSWER

    await seconds_of_short_answer()
    usual = await seconds_of_short_answer()
    slots = connection.info.slots or 1
    rests = await asyncio.gather(*(leave_a_stream() for _ in range(slots)))
    measured = [rest for rest in rests if rest is not None]
    if len(measured) < slots:
        fix = "try a model that writes longer answers, or look for a proxy that buffers the answer"
        return Finding("cancelling", "skipped", "an answer ended before its stream could be closed", fix)
    after = await seconds_of_short_answer()
    streams = "1 stream was" if slots == 1 else f"{slots} streams were"
    what = f"{after:.2f} s for a short answer after {streams} closed early, {usual:.2f} s before"
    # If the server went on generating, the short answer had to wait for the rest of a long one.
    if after - usual > max(min(measured) / 2, _JITTER_SECONDS):
        fix = "the server goes on generating for clients that have left: update it, or lower max_tokens"
        return Finding("cancelling", "warning", what, fix)
    return Finding("cancelling", "ok", what)


async def check_tools(connection: ServerConnection) -> Finding:
    """Checks a round trip: the model calls a tool, and answers with its result."""
    # Agents take a while to import.
    from lmbridge.agent.agent import Agent  # noqa: PLC0415 - see above

    calls: list[str] = []

    def get_word() -> str:
        """Returns the word of the day."""
        calls.append("get_word")
        return _WORD_OF_THE_DAY

    agent = Agent(connection.client, tools=[get_word], max_rounds=3, max_tokens=300, on_limit="answer")
    result = await agent.run("What is the word of the day? Call the tool get_word, then answer.", temperature=0)
    if not calls:
        fix = "the server accepts tools, but this model does not call them: try a model that was trained for it"
        return Finding("tools", "warning", "the model did not call the tool", fix)
    if _WORD_OF_THE_DAY not in result.text:
        fix = "a larger model is more likely to use the results of tools"
        return Finding("tools", "warning", "the model called the tool, but did not use its result", fix)
    return Finding("tools", "ok", "the model called a tool and answered with its result")


@attrs.frozen
class _Capital:
    country: str
    capital: str


async def check_structured_output(connection: ServerConnection) -> Finding:
    """Checks whether the server makes an answer follow a JSON schema."""
    messages = _question("The capital of France is Paris. Write this down.")
    try:
        await connection.client.parse(messages, _Capital, max_tokens=100, temperature=0)
    except LLMValidationError as error:
        if error.partial is None:
            raise
        fix = "use a server that supports response_format with a JSON schema, such as LM Studio or llama.cpp"
        return Finding("structured output", "warning", f"the answer does not follow the schema: {error.message}", fix)
    return Finding("structured output", "ok", "an answer followed a JSON schema")


async def check_embeddings(connection: ServerConnection) -> Finding:
    """Checks whether the server offers embeddings, which many servers do not."""
    model = next((each.id for each in connection.info.models if only_embeds(each)), connection.model)
    try:
        reply = await connection.client.embeddings("hello", model=model)
    except LLMError as error:
        fix = "load an embedding model if you need them; llama-server needs --embeddings"
        return Finding("embeddings", "skipped", f"not offered: {error.message}", fix)
    size = len(reply["data"][0]["embedding"])
    return Finding("embeddings", "ok", f"{size} numbers from {model}")


async def check_truncation(connection: ServerConnection) -> Finding:
    """Checks whether a prompt that does not fit into the context is refused, and not cut off without an error."""
    context = connection.context_length
    if context is None:
        fix = "find out how long the context is: prompts that do not fit may be cut off without an error"
        return Finding("long prompts", "skipped", "the server does not report its context length", fix)
    if context > _LONGEST_PROBE:
        fix = f"keep prompts shorter than the context, or try it with one of at most {_LONGEST_PROBE} tokens"
        return Finding("long prompts", "skipped", f"the context of {context} tokens would take too long to fill", fix)
    # Each of the words is at least one token.
    prompt = " ".join(f"word{number}" for number in range(context))
    try:
        reply = await connection.client.chat_completion(_question(prompt), max_tokens=1)
    except ContextLengthExceededError:
        return Finding("long prompts", "ok", f"a prompt beyond the context of {context} tokens is refused")
    counted = (reply.get("usage") or {}).get("prompt_tokens")
    fix = (
        "load the model with a longer context (num_ctx or OLLAMA_CONTEXT_LENGTH for Ollama, the context length in LM"
        " Studio, -c for llama-server), and keep prompts shorter than it"
    )
    what = f"a prompt of more than {context} tokens was cut off without an error (the server counted {counted})"
    return Finding("long prompts", "warning", what, fix)


def other_model(connection: ServerConnection) -> ModelInfo | None:
    """Returns a model that can chat and is not the model of the connection, or None."""
    others = (each for each in connection.info.models if each.id != connection.model)
    return next((each for each in others if not only_embeds(each)), None)


async def check_model_switch(connection: ServerConnection) -> Finding:
    """Checks whether a request for another model kills a generation. It loads the other model."""
    other = other_model(connection)
    if other is None:
        return Finding("model switch", "skipped", "there is only one model")
    # The second request is made by a separate client, because the scheduler of the first one would make it wait.
    async with (
        connection.client.stream_chat(_question(_LONG_QUESTION), max_tokens=_LONG_ANSWER) as stream,
        connection.open_separate_client(Limits()) as other_client,
    ):
        await anext(stream)
        request = asyncio.create_task(other_client.chat_completion(_question("Say hi."), model=other.id, max_tokens=1))
        try:
            killed = await _failure_of(stream)
            await asyncio.wait({request})
        finally:
            await end_task(request)
    if killed is not None:
        return Finding("model switch", "warning", f"it killed the generation: {killed.message}", _SWITCH_FIX)
    if (failure := request.exception()) is not None:
        reason = failure.message if isinstance(failure, LLMError) else failure
        return Finding("model switch", "warning", f"{other.id} could not answer meanwhile: {reason}", _SWITCH_FIX)
    return Finding("model switch", "ok", f"{other.id} answered, and the generation of {connection.model} went on")


async def _failure_of(stream: ChatStream) -> LLMError | None:
    """Reads a stream to its end, and returns the error that ended it, if there is one."""
    try:
        async for _ in stream:
            pass
    except LLMError as error:
        return error
    return None


SERVER_CHECKS: Final[Sequence[tuple[str, Check]]] = (
    ("model", check_model),
    ("streaming", check_streaming),
    ("cancelling", check_cancelling),
    ("tools", check_tools),
    ("structured output", check_structured_output),
    ("embeddings", check_embeddings),
    ("long prompts", check_truncation),
)
"""The names and functions of the checks that change nothing on the server, in the order in which they run."""
