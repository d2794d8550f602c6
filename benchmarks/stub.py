"""The server that all are measured against: as fast as asyncio allows, in a process of its own.

The model's name says what it answers:

- `stream-CHUNKS-PERWRITE`: so many chunks, at least two, so many of them a socket write, each an HTTP chunk of its
  own, as servers send them; then `[DONE]`, then the end of the body in a write of its own. All but the last chunk
  have a word of text;
- `stall-CHUNKS-TAG`: so many chunks in one write, and then silence. `GET /left/TAG` tells when its connection closed,
  by the machine's monotonic clock.

Without `"stream": true` the answer to any model is a whole completion. It prints its port, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, repeat
from typing import Any, Final

WORDS: Final = (" lighthouse", " shorelines")  # litellm gives up on a model that says the same again and again
WORD: Final = WORDS[0]
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_MODEL: Final = re.compile(rb'"model" *: *"([^"]*)"')
_STREAM: Final = re.compile(rb'"stream" *: *true')
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_END: Final = b"0\r\n\r\n"
_left: dict[str, float] = {}


def completion(model: str) -> dict[str, Any]:
    """A whole reply."""
    message = {"role": "assistant", "content": WORD * 20, "refusal": None}
    return {
        "id": "chatcmpl-8f2bdb1c0e4f4b7d9a61",
        "object": "chat.completion",
        "created": 1795332231,
        "model": model,
        "system_fingerprint": "fp_8f2bdb1c",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 36, "completion_tokens": 20, "total_tokens": 56},
    }


def chunk(model: str, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    """A chunk of a streamed one."""
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
    """The first chunk, two others, and the last with what follows it."""
    first = _event(chunk(model, {"role": "assistant", "content": WORD}))
    one, other = (_event(chunk(model, {"content": word})) for word in WORDS)
    return first, one, other, _event(chunk(model, {}, "stop")) + _event(b"[DONE]")


def _some(model: str, count: int) -> bytes:
    _, one, other, _ = _parts(model)
    return (other + one) * (count // 2) + other * (count % 2)


def _writes(model: str) -> Iterator[bytes]:
    """What goes into each socket write."""
    first, _, _, last = _parts(model)
    chunks, size = map(int, model.split("-")[1:])
    begun = min(chunks - 2, size - 1)
    whole, rest = divmod(chunks - 2 - begun, size)
    head = _HEAD + first + _some(model, begun)
    return chain((head,), repeat(_some(model, size), whole), (_some(model, rest) + last, _END))


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._writes: Iterator[bytes] | None = None
        self._paused = False
        self._tag = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._writes = None
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
        found = _MODEL.search(body)
        model = found[1].decode() if found else "stub"
        if not _STREAM.search(body):
            self._transport.write(_plain(model))
        elif model.startswith("stall-"):
            _, chunks, self._tag = model.split("-", 2)
            self._transport.write(_HEAD + _parts(model)[0] + _some(model, int(chunks) - 1))
        else:
            self._writes = _writes(model)
            self._write()

    def _write(self) -> None:
        if self._paused or self._writes is None:
            return
        piece = next(self._writes, None)
        if piece is None:
            self._writes = None
            return
        self._transport.write(piece)
        self._loop.call_soon(self._write)  # one write a turn: many streams advance side by side


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    loop.add_reader(sys.stdin, ended.set)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(serve())
