"""Ready-made behaviours: each of these functions returns a behaviour, with which a `ScriptedServer` replies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lmbridge.testing import wire
from lmbridge.testing.completions import (
    completion,
    completion_chunk,
    message_deltas,
    split_words,
    usage_chunk,
    usage_of,
)
from lmbridge.testing.exchange import Behaviour, Exchange, encode_event


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
    """Replies with a chat completion: a plain one, or a stream if the request has `"stream": true`.

    A stream has the same form as a stream of llama.cpp. First comes a chunk with the role, then the reasoning, the
    content and the tool calls with their arguments in fragments, then the finish reason with an empty delta. If the
    `stream_options` of the request ask for the usage, the next chunk has the usage and no choices. The end is `[DONE]`.

    Args:
        text: The content of the answer.
        chunks: The pieces in which a stream sends the content. By default there is one for each word of `text`.
        model: The name of the model in the reply. By default it is the model of the request.
        finish_reason: The finish reason, or None for a reply without one. By default it is "tool_calls" if there are
            tool calls, otherwise "stop".
        usage: The token usage. By default it is one token for the prompt, and one for each chunk of content.
        tool_calls: The tool calls in the form that a message has: `{"id", "type", "function": {"name", "arguments"}}`.
        reasoning: The text of `reasoning_content`. By default the reply has none.
        gate: An event that lets a test hold the reply back until it sets the event. A stream awaits it after the first
            chunk of content, or before the finish reason if the reply has no content. A plain reply awaits it first.
        pace: The seconds to wait before each chunk of content. A plain reply takes as long as all chunks together.
        extra: Further fields for the completion, or for each chunk.
    """
    return _AnswerBehaviour(
        text=text,
        chunks=split_words(text) if chunks is None else list(chunks),
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
class _AnswerBehaviour:
    """The behaviour that `answer` returns. The fields are the arguments of that function."""

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
            await self._send_stream(exchange, model)
        else:
            await self._send_whole(exchange, model)

    async def _send_whole(self, exchange: Exchange, model: str) -> None:
        message: dict[str, Any] = {"content": self.text}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        body = completion(exchange.reply_id, model, message, finish_reason=self.finish_reason, usage=self._usage())
        await self._wait_for_gate()
        await self._sleep_for(len(self.chunks))
        await reply(200, body | self.extra)(exchange)

    async def _send_stream(self, exchange: Exchange, model: str) -> None:
        gate_passed = False
        for delta in message_deltas(self.reasoning or "", self.chunks, self.tool_calls):
            has_content = delta.get("content") is not None
            await self._sleep_for(has_content)
            await exchange.chunk(completion_chunk(exchange.reply_id, model, delta) | self.extra)
            if has_content and not gate_passed:
                gate_passed = True
                await self._wait_for_gate()
        if not gate_passed:
            await self._wait_for_gate()
        await self._send_end(exchange, model)

    async def _send_end(self, exchange: Exchange, model: str) -> None:
        if self.finish_reason is not None:
            last = completion_chunk(exchange.reply_id, model, {}, finish_reason=self.finish_reason)
            await exchange.chunk(last | self.extra)
        options = exchange.request.fields.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            await exchange.chunk(usage_chunk(exchange.reply_id, model, self._usage()) | self.extra)
        await exchange.done()
        await exchange.end()

    def _usage(self) -> Mapping[str, Any]:
        return usage_of(self.chunks) if self.usage is None else self.usage

    async def _sleep_for(self, chunks: int) -> None:
        if self.pace and chunks:
            await asyncio.sleep(self.pace * chunks)

    async def _wait_for_gate(self) -> None:
        if self.gate is not None:
            await self.gate.wait()


def reply(
    status: int,
    body: bytes | str | Mapping[str, Any] | Sequence[Any] = b"",
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
) -> Behaviour:
    """Replies with a whole response that has a Content-Length.

    Args:
        status: The HTTP status.
        body: The body. A mapping or a sequence is sent as JSON.
        headers: Further header fields. They replace default ones of the same name.
        content_type: The Content-Type. By default it depends on the type of `body`.
    """
    if isinstance(body, str):
        data, default_type = body.encode(), "text/plain; charset=utf-8"
    elif isinstance(body, bytes):
        data, default_type = body, "application/octet-stream"
    else:
        data, default_type = wire.to_json(body), "application/json"

    async def behave(exchange: Exchange) -> None:
        length = {} if wire.has_no_body("", status) else {"Content-Length": str(len(data))}
        await exchange.start(
            status, wire.override_fields(length, headers), content_type=content_type or default_type, chunked=False
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
    """Replies with a stream of events, each in a separate HTTP chunk.

    Args:
        *events: The events. A mapping is sent as `data: ` and its JSON. Strings and bytes are sent unchanged: no
            `data: ` and no empty line is added, so that they can be any part of an event.
        content_type: The Content-Type.
        status: The HTTP status.
        done: Whether `data: [DONE]` follows the events.
        end: Whether the body is ended properly. If it is False, the server closes the connection without ending it.
    """

    async def behave(exchange: Exchange) -> None:
        await exchange.start(status, content_type=content_type)
        await _send_events(exchange, events)
        if done:
            await exchange.done()
        if end:
            await exchange.end()
        else:
            exchange.hang_up()

    return behave


async def _send_events(exchange: Exchange, events: Sequence[Mapping[str, Any] | str | bytes]) -> None:
    for item in events:
        if isinstance(item, Mapping):
            await exchange.send(encode_event(item))
        else:
            await exchange.send(item.encode() if isinstance(item, str) else item)


def raw(*pieces: bytes) -> Behaviour:
    """Sends a reply, including its status line, each piece in a separate packet, and then closes the connection."""

    async def behave(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.raw(piece)
        exchange.hang_up()

    return behave


def stall(after: Sequence[Mapping[str, Any] | str | bytes] = ()) -> Behaviour:
    """Sends some events or nothing, and then waits until the client disconnects.

    Args:
        after: The events to send first, in the form that `sse` takes. With an empty list, not even the head is sent.
            Use `after=("",)` to send only the head.
    """

    async def behave(exchange: Exchange) -> None:
        if after:
            await exchange.start()
            await _send_events(exchange, after)
        await exchange.client_left()

    return behave


def reset() -> Behaviour:
    """Reads the request, and then breaks the connection with a TCP reset."""

    async def behave(exchange: Exchange) -> None:
        exchange.reset()

    return behave


def hang_up() -> Behaviour:
    """Reads the request, and then closes the connection without a reply."""

    async def behave(exchange: Exchange) -> None:
        exchange.hang_up()

    return behave
