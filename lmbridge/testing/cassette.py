"""`Cassette`: records what a real server sends, and replays it without the server.

A cassette sits between the transport and the socket, so everything above it is real during a replay: retries, errors,
time limits, the schedule, and streams, which arrive in the parts in which they were received. The alternative,
recording the dicts that a client returns, would replay none of that. The library vcrpy does not record the boundaries
of the parts, and so leaves out what makes streams difficult.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from lmbridge._checks import check_choice, check_path, check_seconds, invalid_argument
from lmbridge._text import shorten
from lmbridge.config import QUESTION_HEADER
from lmbridge.testing.cassette_file import (
    CassetteError,
    CassetteRequest,
    RecordedExchange,
    RecordedPart,
    Redactor,
    Tape,
    public_headers,
    read_cassette,
    redacted_parts,
    write_cassette,
)
from lmbridge.testing.mcp_tape import McpTape
from lmbridge.testing.wire import Headers
from lmbridge.transport import faults
from lmbridge.transport.http_interface import ConnectionFailed, HttpRequest, HttpResponse
from lmbridge.transport.interception import Send, interceptors, link_makers

CassetteMode: TypeAlias = Literal["none", "once", "all"]
"""What a cassette does with requests: "none" only replays them, "once" records them if the file does not exist, and
"all" always records them."""
Matcher: TypeAlias = Callable[[CassetteRequest, CassetteRequest], bool]
"""A function `(recorded, new) -> bool` that decides whether a recorded exchange answers a new request."""

_FIELDS: Final[Mapping[str, Matcher]] = {
    "method": lambda recorded, new: recorded.method == new.method,
    "host": lambda recorded, new: recorded.host == new.host,
    "path": lambda recorded, new: recorded.path == new.path,
    "query": lambda recorded, new: recorded.query == new.query,
    "body": lambda recorded, new: recorded.body == new.body,
}
_MODES: Final = ("none", "once", "all")
_ADVICE: Final = "delete the file, or pass mode='all', to record it anew"


class Cassette:
    """Records the exchanges with a server the first time, and replays them from a file afterwards.

    ::

        with Cassette("tests/cassettes/hello.json"):
            async with LLMClient("http://127.0.0.1:1234/v1", "qwen3-4b") as client:
                reply = await client.chat_completion([{"role": "user", "content": "Hello!"}])

    It applies to all requests over sockets that lmbridge makes in this process while the block is open: those of
    clients, pools and agents, including the blocking ones. If several cassettes are open, the last one alone applies.
    MCP servers on stdio whose sessions begin in the block are recorded as well, and a replay does not start them. If a
    request to an MCP server has no recorded exchange, the request fails, and the block ends with a `CassetteError`.
    Requests to MCP servers on HTTP are not recorded.

    Each exchange is replayed once. Exchanges that answer equal requests are replayed in the order of the recording.
    Only a GET, such as a health check, may be replayed any number of times. A request that has no recorded exchange
    raises a `CassetteError` that says how it differs from the closest one. The recording is written when the block
    ends. If an exception leaves the block, the file stays as it was.

    The file contains prompts and answers, but no header of a request. Keys are redacted wherever a request or a
    response quotes them.

    Args:
        path: The file, whose folder is created if necessary.
        mode: "once", the default, records if the file does not exist, and only replays if it does. "none" only replays,
            and "all" always records and replaces the file.
        match_on: What has to be equal for an exchange to answer a request: "method", "host", "path", "query", "body",
            or a function `(recorded, new) -> bool` of two `CassetteRequest`. By default it is everything but the host.
            It does not apply to requests to MCP servers.
        redact: Further texts that the file must not contain, such as the name of a customer.
        time_scale: The factor by which the recorded waits are multiplied in a replay: 1 is the pace of the server, and
            with 0, the default, there are no waits.

    Raises:
        LLMValidationError: An argument cannot be used.
        CassetteError: The file is not a cassette, or `mode` is "none" and the file is missing. Raised when the block
            begins.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        mode: CassetteMode = "once",
        *,
        match_on: Sequence[str | Matcher] = ("method", "path", "query", "body"),
        redact: Sequence[str] = (),
        time_scale: float = 0.0,
    ) -> None:
        self.path: Final = Path(check_path("path", path))
        self.mode: Final[CassetteMode] = check_choice("mode", mode, _MODES)
        self._matchers = [_matcher(each) for each in match_on]
        self._redactor = Redactor(redact)
        # 0 is allowed as well as positive numbers.
        self._time_scale = 0.0 if time_scale == 0 else check_seconds("time_scale", time_scale, optional=False)
        self._exchanges: list[RecordedExchange] = []
        self._unplayed: list[RecordedExchange] = []
        self._recordings: list[_RecordedResponse] = []
        self._mcp = McpTape((), self._redactor.redact, 0.0)
        self._is_recording = False
        self._is_open = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path} mode={self.mode!r}>"

    @property
    def is_recording(self) -> bool:
        """Whether requests go to the server. It is decided when the block begins."""
        return self._is_recording

    @property
    def play_count(self) -> int:
        """How many of the recorded exchanges have been replayed."""
        played_mcp = 0 if self._is_recording else len(self._mcp.exchanges) - len(self._mcp.unplayed)
        return len(self._exchanges) - len(self._unplayed) + played_mcp

    @property
    def all_played(self) -> bool:
        """Whether every recorded exchange has been replayed: the program has made every request of the recording."""
        return not self._unplayed and not self._mcp.unplayed

    def __enter__(self) -> Self:
        if self._is_open:
            raise RuntimeError(f"{self!r} is open already; create another one")
        recorded = None if self.mode == "all" else read_cassette(self.path)
        if recorded is None and self.mode == "none":
            raise CassetteError(
                f"the cassette {self.path} does not exist; record it with mode='once' while the server is running"
            )
        self._is_recording = recorded is None
        self._exchanges = [] if recorded is None else recorded.exchanges
        self._mcp = McpTape(None if recorded is None else recorded.mcp, self._redactor.redact, self._time_scale)
        self._unplayed = list(self._exchanges)
        self._recordings = []
        self._is_open = True
        interceptors.append(self._intercept)
        link_makers.append(self._mcp.make_link)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interceptors.remove(self._intercept)
        link_makers.remove(self._mcp.make_link)
        self._is_open = False
        if self._is_recording and kind is None:
            write_cassette(self.path, Tape([each.finished() for each in self._recordings], self._mcp.exchanges))
        elif self._mcp.problems and kind is None:
            problems = "; ".join(self._mcp.problems[:3])
            raise CassetteError(f"the cassette {self.path} has {problems}; {_ADVICE}")

    async def _intercept(self, request: HttpRequest, send: Send) -> HttpResponse:
        if not self._is_recording:
            return await self._replay(request)
        if _is_own_question(request):
            return await send(request)
        began = monotonic()
        response = await send(request)
        recording = _RecordedResponse(request, response, self._redactor, monotonic() - began)
        self._recordings.append(recording)
        return recording

    async def _replay(self, request: HttpRequest) -> HttpResponse:
        if _is_own_question(request):
            # Whether a client asks depends on the timing of its requests, so these questions are neither recorded nor
            # replayed.
            return _Replay(_NO_ANSWER, 0.0)
        new = self._redactor.read(request)
        exchange = self._take(new)
        if exchange is None:
            raise CassetteError(self._describe_difference(new))
        await asyncio.sleep(exchange.seconds * self._time_scale)
        return _Replay(exchange, self._time_scale)

    def _take(self, new: CassetteRequest) -> RecordedExchange | None:
        """Returns the exchange that answers a request, and takes it off the tape."""
        for exchange in self._unplayed:
            if self._answers(exchange, new):
                self._unplayed.remove(exchange)
                return exchange
        if new.method != "GET":
            return None
        return next((each for each in reversed(self._exchanges) if self._answers(each, new)), None)

    def _answers(self, exchange: RecordedExchange, new: CassetteRequest) -> bool:
        return all(matches(exchange.request, new) for matches in self._matchers)

    def _describe_difference(self, new: CassetteRequest) -> str:
        message = f"the cassette {self.path} has no exchange for {new.method} {new.path}"
        if any(self._answers(each, new) for each in self._exchanges):
            return f"{message} any more: the program made this request more often than when it was recorded"
        same_path = [each for each in self._unplayed or self._exchanges if each.request.path == new.path]
        closest = min(same_path, key=lambda each: len(_differences(each.request, new)), default=None)
        if closest is None:
            return f"{message}; {_ADVICE}"
        return f"{message}; the closest one differs in {'; '.join(_differences(closest.request, new)[:3])}; {_ADVICE}"


class _RecordedResponse:
    """An `HttpResponse` that passes on what it reads from another one, and records it."""

    def __init__(self, request: HttpRequest, response: HttpResponse, redactor: Redactor, seconds: float) -> None:
        self.status = response.status
        self.headers = response.headers
        self._request = redactor.read(request)
        self._pattern = redactor.pattern_for(request)
        self._response = response
        self._seconds = seconds
        self._last = monotonic()
        self._parts: list[RecordedPart] = []
        self._end: Literal["complete", "broken", "left"] = "left"
        self._is_closed = False

    async def read_some(self) -> bytes:
        try:
            data = await self._response.read_some()
        except ConnectionFailed:
            # A connection that the client itself has closed is not broken.
            if not self._is_closed:
                self._end = "broken"
            raise
        if not data:
            self._end = "complete"
        self._record_part(data)
        return data

    def take_arrived(self) -> bytes:
        data = self._response.take_arrived()
        self._record_part(data)
        return data

    def close(self) -> None:
        self._is_closed = True
        self._response.close()

    def _record_part(self, data: bytes) -> None:
        now = monotonic()
        if data:
            self._parts.append(RecordedPart(now - self._last, data))
        self._last = now

    def finished(self) -> RecordedExchange:
        """Returns what has been recorded."""
        end = self._end
        if end == "left" and self._parts and self._parts[-1].data.rstrip().endswith(b"[DONE]"):
            # The stream was complete. The client left before the server had ended the body.
            end = "complete"
        return RecordedExchange(
            request=self._request,
            status=self.status,
            headers=public_headers(self.headers, self._pattern),
            seconds=self._seconds,
            parts=redacted_parts(self._parts, self._pattern),
            end=end,
        )


class _Replay:
    """An `HttpResponse` that is read from a cassette."""

    def __init__(self, exchange: RecordedExchange, time_scale: float) -> None:
        self.status = exchange.status
        self.headers: Mapping[str, str] = Headers(exchange.headers.items())
        self._exchange = exchange
        self._time_scale = time_scale
        self._parts = iter(exchange.parts)
        self._has_ended = False
        self._closed = asyncio.Event()

    async def read_some(self) -> bytes:
        if self._has_ended:
            return b""
        part = next(self._parts, None)
        await self._wait(0.0 if part is None else part.seconds * self._time_scale)
        if self._closed.is_set():
            raise faults.connection_failed(faults.BROKEN_IN_BODY, status=self.status)
        if part is not None:
            return part.data
        if self._exchange.end == "broken":
            raise faults.connection_failed(faults.BROKEN_IN_BODY, status=self.status)
        if self._exchange.end == "left":
            raise CassetteError(
                f"the recorded response to {self._exchange.request.method} {self._exchange.request.path} ends here,"
                " because the program stopped reading when it was recorded; record it anew"
            )
        self._has_ended = True
        return b""

    async def _wait(self, seconds: float) -> None:
        """Waits until the next part is due, or the response is closed by another task."""
        if not seconds:
            # A response from a socket lets other tasks run as well.
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            pass

    def take_arrived(self) -> bytes:
        # A part arrives when it is read.
        return b""

    def close(self) -> None:
        if not self._has_ended:
            self._closed.set()


_NO_ANSWER: Final = RecordedExchange(
    request=CassetteRequest(method="GET", url=""), status=404, headers={}, seconds=0.0, end="complete"
)


def _is_own_question(request: HttpRequest) -> bool:
    """Returns whether a client sends a request on its own initiative, to find out the limits of its server."""
    name, purpose = QUESTION_HEADER
    return request.headers.get(name) == purpose


def _matcher(field: str | Matcher) -> Matcher:
    if callable(field):
        return field
    if field not in _FIELDS:
        raise invalid_argument("match_on", f"functions, or {', '.join(map(repr, _FIELDS))}", field)
    return _FIELDS[field]


def _differences(recorded: CassetteRequest, new: CassetteRequest) -> list[str]:
    """Describes in which fields two requests differ. If both bodies are objects, it names the fields of the bodies."""
    found = [name for name, is_equal in _FIELDS.items() if name != "host" and not is_equal(recorded, new)]
    if not isinstance(recorded.body, dict) or not isinstance(new.body, dict):
        return found
    return [each for each in found if each != "body"] + [
        f"{name} (recorded: {_quoted(recorded.body.get(name))}, now: {_quoted(new.body.get(name))})"
        for name in dict.fromkeys([*recorded.body, *new.body])
        if recorded.body.get(name) != new.body.get(name)
    ]


def _quoted(value: object) -> str:
    return shorten(repr(value), 100)
