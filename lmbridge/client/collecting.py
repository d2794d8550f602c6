"""`collect`: turns a stream into the reply that the plain call would have returned."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from lmbridge._checks import wrong_type
from lmbridge.client.chat_accumulator import ChatAccumulator, accumulator_for
from lmbridge.client.reply_stream import ReplyStream
from lmbridge.errors import LLMError, LLMStreamError

if TYPE_CHECKING:
    from lmbridge.types import ChatCompletion

_Reply_co = TypeVar("_Reply_co", covariant=True)


@overload
async def collect(stream: ReplyStream[Any, _Reply_co]) -> _Reply_co: ...


@overload
async def collect(stream: AsyncIterable[Mapping[str, Any]]) -> ChatCompletion: ...


async def collect(stream: AsyncIterable[Mapping[str, Any]]) -> Any:
    """Reads a stream to its end, and returns the dict that the plain call would have returned.

    For example::

        stream = await client.chat_completion(messages, stream=True)
        reply = await collect(stream)
        print(reply["choices"][0]["message"]["content"])

    Content, reasoning and tool calls are joined; usage and finish reason are kept. Servers send the usage of a stream
    only when asked, with `stream_options={"include_usage": True}`; otherwise it is None. If an error or a cancellation
    interrupts the reading, the stream is closed.

    Args:
        stream: A `ChatStream`, `TextStream` or `ResponseStream`. The result is the whole reply, even if you have read a
            part of the stream, or all of it, before. Any other asynchronous iterable of the chunks of a chat or text
            completion is accepted as well; then the result contains only the chunks that it still yields.

    Raises:
        LLMStreamError: A chunk has an unknown shape, or the iterable yielded no chunk.
        LLMError: The errors that iterating the stream raises.
    """
    if not hasattr(stream, "__aiter__"):
        is_reply = isinstance(stream, Mapping)
        hint = "it is a whole reply already" if is_reply else "pass what a call with stream=True returns"
        raise wrong_type("stream", "a stream", stream, hint)
    if isinstance(stream, ReplyStream):
        return await stream._read_to_end()  # noqa: SLF001 - it has accumulated what was read before
    accumulator: ChatAccumulator | None = None
    try:
        async for chunk in stream:
            accumulator = accumulator or accumulator_for(chunk)
            accumulator.add(chunk)
    except BaseException as error:
        # A cancellation, too, has to end the generation.
        if isinstance(error, LLMError) and error.partial is None and accumulator is not None and accumulator.has_begun:
            error.completed(partial=accumulator.reply())
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()
        raise
    if accumulator is None:
        raise LLMStreamError("there was no chunk to collect", hint="the stream may have been read before")
    return await accumulator.reply_in_slices()
