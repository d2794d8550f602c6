"""The stub server of completions, as fast as asyncio allows, which runs in a separate process.

The name of the model selects the answer:

- `stream-CHUNKS-PERWRITE`: a stream of `CHUNKS` chunks (at least two), of which each socket write contains `PERWRITE`.
  Each chunk is one HTTP chunk, as real servers send them. After `[DONE]`, a separate write ends the body. All chunks
  except the last contain one word of text.
- `paced-CHUNKS-MILLISECONDS`: the same with one chunk a write, and a pause after each, as a model writes.
- `stall-CHUNKS-TAG`: a stream that sends `CHUNKS` chunks in one write, and then nothing. `GET /left/TAG` returns the
  time at which the connection was closed, by the monotonic clock of the machine.
- `agent-CALLS`: a tool call in each reply until the conversation has `CALLS` results, and then an answer, streamed or
  plain as requested. If the name ends in `-stall`, the answer stalls; `GET /stalled` returns the number of stalled
  answers.

For any other model, and without `"stream": true`, the answer is a whole completion. The server prints its port, and
ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import chain, cycle, islice
from typing import Any, Final

# There are two words, because litellm stops a stream whose chunks all have the same text.
WORDS: Final = (" lighthouse", " shorelines")
WORD: Final = WORDS[0]
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_MODEL: Final = re.compile(rb'"model" *: *"([^"]*)"')
_STREAM: Final = re.compile(rb'"stream" *: *true')
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_END: Final = b"0\r\n\r\n"
_NOT_FOUND: Final = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
_RESULT: Final = re.compile(rb'"role" *: *"tool"')
USAGE: Final = {"prompt_tokens": 36, "completion_tokens": 20, "total_tokens": 56}
ANSWER: Final = "That is the sum of all these numbers."
"""The answer of an agent's model after its tool calls."""
_stalled: set[asyncio.Transport] = set()
_left: dict[str, float] = {}


def completion(model: str) -> dict[str, Any]:
    """Returns a whole completion."""
    message = {"role": "assistant", "content": WORD * 20, "refusal": None}
    return {
        "id": "chatcmpl-8f2bdb1c0e4f4b7d9a61",
        "object": "chat.completion",
        "created": 1795332231,
        "model": model,
        "system_fingerprint": "fp_8f2bdb1c",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def chunk(model: str, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """Returns a chunk of a streamed completion."""
    return {
        "id": "chatcmpl-8f2bdb1c0e4f4b7d9a61",
        "object": "chat.completion.chunk",
        "created": 1795332231,
        "model": model,
        "system_fingerprint": "fp_8f2bdb1c",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }


def _event(value: object) -> bytes:
    data = b"data: %s\n\n" % (value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode())
    return b"%x\r\n%s\r\n" % (len(data), data)


def _json(value: object) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head + body


@lru_cache
def _plain(model: str) -> bytes:
    return _json(completion(model))


@lru_cache
def _parts(model: str) -> tuple[bytes, bytes, bytes, bytes]:
    """Returns the first chunk, one chunk for each of the two words, and the last chunk with all that follows it."""
    first = _event(chunk(model, {"role": "assistant", "content": WORD}))
    one, other = (_event(chunk(model, {"content": word})) for word in WORDS)
    return first, one, other, _event(chunk(model, {}, "stop")) + _event(b"[DONE]")


def _tool_call(number: int, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": "add", "arguments": arguments}}


@cache
def _agent_reply(model: str, number: int, *, is_last: bool, streamed: bool) -> bytes:
    """Returns the final answer, or the tool call with this number. No two calls have the same arguments."""
    arguments = f'{{"a": {number}, "b": 12345}}'
    if not streamed:
        reply, calls = completion(model), [] if is_last else [_tool_call(number, arguments)]
        reply["choices"][0]["finish_reason"] = "stop" if is_last else "tool_calls"
        reply["choices"][0]["message"] |= {"content": ANSWER if is_last else "", "tool_calls": calls}
        return _json(reply)
    first: dict[str, Any] = {"role": "assistant", "content": ""}
    if is_last:
        deltas = [first, *({"content": f"{word}{' ' * (word != 'numbers.')}"} for word in ANSWER.split())]
    else:
        pieces = ({"index": 0, "function": {"arguments": piece}} for piece in re.split(r"(?<= )", arguments))
        start = {"index": 0, **_tool_call(number, "")}
        deltas = [first, *({"tool_calls": [each]} for each in (start, *pieces))]
    usage = {**chunk(model, {}), "choices": [], "usage": USAGE}
    last = chunk(model, {}, "stop" if is_last else "tool_calls")
    return b"".join([_HEAD, *map(_event, [*(chunk(model, each) for each in deltas), last, usage, b"[DONE]"])])


def _filler_chunks(model: str, count: int, *, swapped: bool = False) -> bytes:
    """Returns chunks with the two words in turn, which begin with the second word, or with the first if swapped."""
    _, one, other, _ = _parts(model)
    if swapped:
        one, other = other, one
    return (other + one) * (count // 2) + other * (count % 2)


def _stream_writes(model: str) -> Iterator[bytes]:
    """Yields the data of each socket write of a stream."""
    first, _, _, last = _parts(model)
    chunks, size = map(int, model.split("-")[1:])
    begun = min(chunks - 2, size - 1)
    whole, rest = divmod(chunks - 2 - begun, size)
    head = _HEAD + first + _filler_chunks(model, begun)
    # The words alternate across writes as well.
    fillers = [_filler_chunks(model, size, swapped=index * size % 2 == 1) for index in range(2)]
    return chain((head,), islice(cycle(fillers), whole), (_filler_chunks(model, rest) + last, _END))


class StubConnection(asyncio.Protocol):
    """The connection of one client."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._pending_writes: Iterator[bytes] | None = None
        self._paused = False
        self._pause = 0.0
        self._tag = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        self._pending_writes = None
        _stalled.discard(self._transport)
        if self._tag:
            _left[self._tag] = time.monotonic()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._write()

    def data_received(self, data: bytes) -> None:
        data = self._received + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(data, 0, end)
            stop = end + 4 + (int(length[1]) if length else 0)
            if len(data) < stop:
                break
            self._answer(data[:end], data[end + 4 : stop])
            data = data[stop:]
        self._received = data

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET /left/"):
            tag = head[10:].split(b" ", 1)[0].decode()
            self._transport.write(_json({"left": _left.get(tag)}))
            return
        if head.startswith(b"GET /stalled "):
            self._transport.write(_json({"stalled": len(_stalled)}))
            return
        if head.startswith(b"GET "):
            self._transport.write(_NOT_FOUND)
            return
        found = _MODEL.search(body)
        model = found[1].decode() if found else "stub"
        if model.startswith("agent-"):
            self._answer_agent(model, body)
        elif not _STREAM.search(body):
            self._transport.write(_plain(model))
        elif model.startswith("stall-"):
            _, chunks, self._tag = model.split("-", 2)
            self._transport.write(_HEAD + _parts(model)[0] + _filler_chunks(model, int(chunks) - 1))
        else:
            if model.startswith("paced-"):
                _, chunks, milliseconds = model.split("-")
                model, self._pause = f"stream-{chunks}-1", float(milliseconds) / 1e3
            self._pending_writes = _stream_writes(model)
            self._write()

    def _answer_agent(self, model: str, body: bytes) -> None:
        calls, *stall = model.split("-")[1:]
        number, streamed = len(_RESULT.findall(body)), bool(_STREAM.search(body))
        is_last = number == int(calls)
        if is_last and stall:
            begun = _HEAD + _event(chunk(model, {"role": "assistant", "content": ""}))
            self._transport.write(begun if streamed else b"")
            _stalled.add(self._transport)
            return
        reply = _agent_reply(model, number, is_last=is_last, streamed=streamed)
        self._pending_writes = iter((reply, _END) if streamed else (reply,))
        self._write()

    def _write(self) -> None:
        if self._paused or self._pending_writes is None:
            return
        piece = next(self._pending_writes, None)
        if piece is None:
            self._pending_writes, self._pause = None, 0.0
            return
        self._transport.write(piece)
        if self._pause:
            self._loop.call_later(self._pause, self._write)
            return
        # Each turn of the event loop does one write, so that concurrent streams advance side by side.
        self._loop.call_soon(self._write)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(StubConnection, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    loop.add_reader(sys.stdin, ended.set)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(serve())
