"""A call of a client, and the responses that it gets: what `make faults` replays, with a fault in one of them."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

import attrs
import msgspec

from lmbridge import LLMClient
from lmbridge.testing.wire import encode_chunk, encode_head

_T = TypeVar("_T")
Framing: TypeAlias = Literal["chunked", "length", "close", "gzip"]
"""How the end of a body is told: chunks, Content-Length, the end of the connection, or chunks of compressed data."""
FRAMINGS: Final[tuple[Framing, ...]] = ("chunked", "length", "close", "gzip")
Call: TypeAlias = Callable[[LLMClient], Awaitable[Any]]
"""Makes a call, and returns its value in the form of JSON."""


@attrs.frozen
class Step:
    """A response of the server, which can be replayed in any framing."""

    request: str
    """The method and the path of the request: "GET /v1/models"."""
    status: int = 200
    content_type: str = "application/json"
    parts: tuple[bytes, ...] = ()
    is_faulted: bool = True
    """Whether the response is replayed with faults. Those that are the same as in another call need not be."""
    is_optional: bool = False
    """Whether the client can do without: it asks for something that not every server has."""

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def is_stream(self) -> bool:
        return "event-stream" in self.content_type

    def framed(self, framing: Framing) -> bytes:
        """Returns all bytes of the response, from the status line on."""
        fields = {"Server": "llama.cpp", "Content-Type": self.content_type}
        match framing:
            case "length":
                return encode_head(self.status, fields | {"Content-Length": str(len(self.body))}) + self.body
            case "close":
                return encode_head(self.status, fields | {"Connection": "close"}) + self.body
            case "chunked":
                return encode_head(self.status, fields | {"Transfer-Encoding": "chunked"}) + _chunked(self.parts)
            case "gzip":
                fields |= {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}
                return encode_head(self.status, fields) + _chunked(_compressed(self.parts))


def _chunked(parts: tuple[bytes, ...]) -> bytes:
    return b"".join([*map(encode_chunk, filter(None, parts)), encode_chunk(b"")])


def _compressed(parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
    compressor = zlib.compressobj(wbits=31)
    # A server that streams flushes its compressor after each event.
    flushed = [compressor.compress(part) + compressor.flush(zlib.Z_SYNC_FLUSH) for part in parts]
    return (*flushed, compressor.flush())


@attrs.frozen
class RecordedCall:
    """A call of a client, with the responses that it gets, in their order."""

    make: Call
    steps: tuple[Step, ...]
    unanswered: Any = None
    """What the call returns in place of an error if the server does not answer; None if it raises the error."""
    limits_all: bool = False
    """Whether a time limit of the call ends its requests. Then what had arrived of the last one does not matter."""
    is_endless: bool = False
    """Whether it reads events until it has enough, and waits for them without a time limit. Events may be missing."""

    @property
    def faulted(self) -> list[int]:
        """The positions of the steps that are replayed with faults."""
        return [position for position, step in enumerate(self.steps) if step.is_faulted]


class Script(Generic[_T]):
    """Says what answers a request: the next thing that is meant for its method and path, of which the last remains."""

    def __init__(self, answers: Iterable[tuple[str, _T]] = ()) -> None:
        self._answers: defaultdict[str, list[_T]] = defaultdict(list)
        for request, answer in answers:
            self._answers[request].append(answer)

    def next(self, request: str) -> _T | None:
        """Returns what answers a request, or None if the server does not know the path."""
        answers = self._answers.get(request)
        if not answers:
            return None
        return answers.pop(0) if len(answers) > 1 else answers[0]


def as_plain(value: Any) -> Any:
    """Returns a value in the form of JSON."""
    return msgspec.to_builtins(value, enc_hook=_as_plain)


def _as_plain(value: Any) -> Any:
    return attrs.asdict(value)


async def items_of(items: AsyncIterator[Any]) -> list[Any]:
    """Returns all items of an async iterator in the form of JSON."""
    return [as_plain(item) async for item in items]
