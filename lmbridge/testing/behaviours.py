"""Ready-made behaviours: functions that return what a `ScriptedServer` is to do with a request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from lmbridge.testing import wire
from lmbridge.testing.completions import completion, completion_chunk, usage_chunk
from lmbridge.testing.exchange import Behaviour, Exchange, event

_FRAGMENT = 8  # characters of a tool call's arguments in one delta


def answer(
    text: str,
    *,
    chunks: Sequence[str] | None = None,
    model: str | None = None,
    finish_reason: str | None = "",
    usage: Mapping[str, Any] | None = None,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
    reasoning: str | None = None,
    gate: asyncio.Event | None = None,
    pace: float = 0.0,
    extra: Mapping[str, Any] | None = None,
) -> Behaviour:
    """Answer as a chat completion: a plain one, or a stream if the request has `"stream": true`.

    A stream is shaped like llama.cpp's: a chunk with the role, the reasoning, the content, the tool calls (their
    arguments in fragments), the finish reason with an empty delta, the usage in a chunk without choices if the
    request's `stream_options` ask for it, and `[DONE]`.

    Args:
        text: The content.
        chunks: The content as a stream has it; by default `text`, a word a chunk.
        model: The model that says it answers, if another than the request's.
        finish_reason: None for a reply that never names one. By default "tool_calls" with tool calls, and "stop"
            without.
        usage: By default a token for the prompt and one for each chunk of content.
        tool_calls: As in a message: `{"id", "type", "function": {"name", "arguments"}}`.
        reasoning: For `reasoning_content`.
        gate: Awaited after the first chunk of content (or before the end, if there is none), and before a plain
            reply: lets a test hold the stream open.
        pace: Seconds before each chunk of content; a plain reply takes as long as all of them.
        extra: More fields for the completion, or for each chunk.
    """
    return _Answer(
        text=text,
        chunks=_words(text) if chunks is None else list(chunks),
        model=model,
        finish_reason=("tool_calls" if tool_calls else "stop") if finish_reason == "" else finish_reason,
        usage=usage,
        tool_calls=list(tool_calls or ()),
        reasoning=reasoning,
        gate=gate,
        pace=pace,
        extra=dict(extra or {}),
    )


@attrs.frozen(kw_only=True)
class _Answer:
    text: str
    chunks: list[str]
    model: str | None
    finish_reason: str | None
    usage: Mapping[str, Any] | None
    tool_calls: list[Mapping[str, Any]]
    reasoning: str | None
    gate: asyncio.Event | None
    pace: float
    extra: dict[str, Any]

    async def __call__(self, exchange: Exchange) -> None:
        model = exchange.model if self.model is None else self.model
        if exchange.request.fields.get("stream"):
            await self._stream(exchange, model)
        else:
            await self._whole(exchange, model)

    async def _whole(self, exchange: Exchange, model: str) -> None:
        message: dict[str, Any] = {"content": self.text}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        body = completion(exchange.reply_id, model, message, finish_reason=self.finish_reason, usage=self._usage())
        await self._hold()
        await self._pace(len(self.chunks))
        await reply(200, body | self.extra)(exchange)

    async def _stream(self, exchange: Exchange, model: str) -> None:
        held = False
        for delta in self._deltas():
            speaks = delta.get("content") is not None
            await self._pace(speaks)
            await exchange.chunk(completion_chunk(exchange.reply_id, model, delta) | self.extra)
            if speaks and not held:
                held = True
                await self._hold()
        if not held:
            await self._hold()
        await self._finish(exchange, model)

    async def _finish(self, exchange: Exchange, model: str) -> None:
        if self.finish_reason is not None:
            last = completion_chunk(exchange.reply_id, model, {}, finish_reason=self.finish_reason)
            await exchange.chunk(last | self.extra)
        options = exchange.request.fields.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            await exchange.chunk(usage_chunk(exchange.reply_id, model, self._usage()) | self.extra)
        await exchange.done()
        await exchange.end()

    def _deltas(self) -> Iterator[dict[str, Any]]:
        yield {"role": "assistant", "content": None}
        for piece in _words(self.reasoning or ""):
            yield {"reasoning_content": piece}
        for piece in self.chunks:
            yield {"content": piece}
        for index, call in enumerate(self.tool_calls):
            for part in _call_parts(index, call):
                yield {"tool_calls": [part]}

    def _usage(self) -> Mapping[str, Any]:
        if self.usage is not None:
            return self.usage
        tokens = len(self.chunks)
        return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}

    async def _pace(self, chunks: int) -> None:
        if self.pace and chunks:
            await asyncio.sleep(self.pace * chunks)

    async def _hold(self) -> None:
        if self.gate is not None:
            await self.gate.wait()


def _words(text: str) -> list[str]:
    """The words of a text, each with the space before it."""
    return re.findall(r"\s*\S+|\s+", text)


def _call_parts(index: int, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A tool call as a stream has it: the name first, then only fragments of the arguments."""
    function = call.get("function") or {}
    arguments = function.get("arguments") or ""
    yield {"index": index, **call, "function": {**function, "arguments": ""}}
    for start in range(0, len(arguments), _FRAGMENT):
        yield {"index": index, "function": {"arguments": arguments[start : start + _FRAGMENT]}}


def reply(
    status: int,
    body: bytes | str | Mapping[str, Any] | Sequence[Any] = b"",
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
) -> Behaviour:
    """Answer with a whole response that has a Content-Length.

    Args:
        status: The HTTP status.
        body: The body; a mapping or a sequence goes as JSON.
        headers: More header fields; they replace those of the same name that would be sent without them.
        content_type: By default what fits the type of `body`.
    """
    if isinstance(body, str):
        data, fitting = body.encode(), "text/plain; charset=utf-8"
    elif isinstance(body, bytes):
        data, fitting = body, "application/octet-stream"
    else:
        data, fitting = wire.to_json(body), "application/json"

    async def behave(exchange: Exchange) -> None:
        length = {} if wire.has_no_body("", status) else {"Content-Length": str(len(data))}
        await exchange.start(
            status, wire.with_own(length, headers), content_type=content_type or fitting, chunked=False
        )
        await exchange.send(data)
        await exchange.end()

    return behave


def sse(
    *events: Mapping[str, Any] | str | bytes,
    content_type: str = "text/event-stream",
    status: int = 200,
    done: bool = False,
    end: bool = True,
) -> Behaviour:
    """Answer with a stream of events, each in an HTTP chunk of its own.

    Args:
        *events: A mapping goes as `data: ` and its JSON; text and bytes go as they are, with no `data: ` or empty
            line of ours, so that they can be any part of an event.
        content_type: The Content-Type.
        status: The HTTP status.
        done: Whether `data: [DONE]` follows.
        end: Whether the body ends properly. Otherwise the server hangs up in the middle of it.
    """

    async def behave(exchange: Exchange) -> None:
        await exchange.start(status, content_type=content_type)
        await _send(exchange, events)
        if done:
            await exchange.done()
        if end:
            await exchange.end()
        else:
            exchange.hang_up()

    return behave


async def _send(exchange: Exchange, events: Sequence[Mapping[str, Any] | str | bytes]) -> None:
    for item in events:
        if isinstance(item, Mapping):
            await exchange.send(event(item))
        else:
            await exchange.send(item.encode() if isinstance(item, str) else item)


def raw(*pieces: bytes) -> Behaviour:
    """Send bytes as they are, the status line included, each in a packet of its own; then FIN."""

    async def behave(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.raw(piece)
        exchange.hang_up()

    return behave


def stall(after: Sequence[Mapping[str, Any] | str | bytes] = ()) -> Behaviour:
    """Answer nothing more until the client leaves.

    Args:
        after: Events to send first, as `sse` takes them. Without any there is not even a head; `after=("",)` is a
            head alone.
    """

    async def behave(exchange: Exchange) -> None:
        if after:
            await exchange.start()
            await _send(exchange, after)
        await exchange.client_left()

    return behave


def reset() -> Behaviour:
    """Read the request, then break the connection with a RST."""

    async def behave(exchange: Exchange) -> None:
        exchange.reset()

    return behave


def hang_up() -> Behaviour:
    """Read the request, then close the connection without an answer."""

    async def behave(exchange: Exchange) -> None:
        exchange.hang_up()

    return behave
