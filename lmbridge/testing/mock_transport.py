"""A transport that calls a function in place of sending a request, for tests that need neither a server nor a socket.

Everything above the socket is real: admission, scheduling, retries, classification, streaming, time limits and
cancellation work through it as they do with a server. What it cannot show is what happens below: bytes that are split
anywhere, connections that are kept or lost, a server that notices that its client has disconnected. For those, use
`lmbridge.testing.ScriptedServer`, which listens on a real socket.

`MockTransport` replaces the `HttpSession` of a `Transport`. There were two alternatives. A test can replace the methods
of the client, but then it tests only the replacements. And a test can patch aiohttp, but then it may break with any
release of aiohttp.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing
from functools import cached_property
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import attrs
import msgspec

from lmbridge._checks import check_callable
from lmbridge._tasks import end_task, mark_exception_retrieved
from lmbridge.config import Limits
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.testing import wire
from lmbridge.transport import faults
from lmbridge.transport.http_interface import ConnectionFailed, HttpRequest, HttpResponse
from lmbridge.transport.transport import Transport

_DONE: Final = "[DONE]"


@attrs.define(eq=False, kw_only=True)
class MockRequest:
    """The request that is passed to the handler of a `MockTransport`."""

    method: str
    """The HTTP method in capital letters."""
    url: str
    """The absolute URL."""
    headers: Mapping[str, str] = attrs.field(repr=False)
    """The headers, including the key. Their names are case-insensitive."""
    body: bytes = attrs.field(default=b"", repr=False)
    """The body. It is empty if the request has none."""

    @property
    def path(self) -> str:
        """The path of the URL, such as "/v1/chat/completions"."""
        return urlsplit(self.url).path

    @cached_property
    def json(self) -> Any:
        """The parsed body, or None if the request has no body.

        Raises:
            msgspec.DecodeError: The body is not JSON.
        """
        return msgspec.json.decode(self.body) if self.body else None


MockEvent: TypeAlias = Mapping[str, Any] | str | bytes
"""One event of a stream: a mapping is sent as JSON, a string as the data of an event, and bytes unchanged, so that they
can be any part of a body."""
MockEvents: TypeAlias = Iterable[MockEvent] | AsyncIterable[MockEvent]
"""The events of a stream, from a list, a generator or an async generator."""


@attrs.define(eq=False)
class MockResponse:
    """A response that the handler of a `MockTransport` returns if a dict or a stream is not enough.

    Set at most one of `json`, `body` and `events`.

    Raises:
        LLMValidationError: More than one of these three is set.
    """

    status: int = 200
    """The HTTP status."""
    json: Any = attrs.field(default=None, kw_only=True)
    """A value that is sent as JSON. Default: None, so that `body` or `events` is sent."""
    body: bytes | str = attrs.field(default=b"", kw_only=True)
    """A body that is sent unchanged, for a reply that is not JSON."""
    events: MockEvents | None = attrs.field(default=None, kw_only=True)
    """The events of an event stream: dicts, strings or bytes, from a list, a generator or an async generator."""
    done: bool = attrs.field(default=True, kw_only=True)
    """Whether the stream ends with `data: [DONE]`. Set it to False to simulate a stream that was cut off."""
    headers: Mapping[str, str] = attrs.field(factory=dict, kw_only=True)
    """The headers of the response. A Content-Type is added if it is missing."""

    def __attrs_post_init__(self) -> None:
        if sum((self.json is not None, bool(self.body), self.events is not None)) > 1:
            raise LLMValidationError("a MockResponse can have only one of json, body and events")


MockAnswer: TypeAlias = Mapping[str, Any] | MockResponse | MockEvents
"""What a handler returns: a dict (sent as JSON with status 200), a response, or the events of a stream."""
MockHandler: TypeAlias = Callable[[MockRequest], MockAnswer | Awaitable[MockAnswer]]
"""A function that answers a request. It may be async."""


class MockTransport(Transport):
    """A transport whose requests are answered by a function.

    ::

        def handler(request):
            assert request.path == "/v1/chat/completions"
            if request.json.get("stream"):
                return [{"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}]}]
            return {"choices": [{"message": {"role": "assistant", "content": "Hello"}}]}

        client = LLMClient(model="qwen3-4b", transport=MockTransport(handler))

    The handler may be a plain or an async function, or an async generator function. It may raise an `OSError`, which
    simulates a connection that failed (`ConnectionRefusedError`: no server is listening; `TimeoutError`: it took too
    long), or an `LLMError`, which is raised to the caller. A generator may raise them as well, which simulates a
    connection that breaks in the middle of the body. Any other exception, such as that of a failed `assert`, reaches
    the caller unchanged, and nothing is retried.

    A generator advances only when the client reads, and it is closed when the client leaves the stream.

    The transport need not be closed, because it has no connections. If it is closed, handlers and generators that are
    still running are cancelled.

    Args:
        handler: Called with a `MockRequest` for each attempt of each request, including model lists and health checks.
        api_base: The base URL of the requests. Nothing has to listen there.
        api_key: The key that the handler finds in the headers. By default it is the environment variable
            `LM_API_TOKEN`.
        limits: How many requests may be in flight at the same time, and for how many models. The default is `Limits()`.

    Raises:
        LLMValidationError: An argument cannot be used.
    """

    def __init__(
        self,
        handler: MockHandler,
        *,
        api_base: str = "http://llm.test/v1",
        api_key: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(api_base, api_key=api_key, limits=limits)
        self._handler = check_callable("handler", handler)
        self.requests: list[MockRequest] = []
        """All attempts of all requests, in the order in which they were made."""

    def __del__(self) -> None:
        # `Transport.__del__` warns about connections that were not closed. This transport has none.
        pass

    def open_session(self) -> _MockSession:
        """Creates the session that calls the handler."""
        return _MockSession(self._handler, self.requests)


class _MockSession:
    """An `HttpSession` that calls a function."""

    def __init__(self, handler: MockHandler, requests: list[MockRequest]) -> None:
        self._handler = handler
        self._requests = requests
        self._closed = False
        # Async handlers and generators run in tasks, so that `close` can cancel them.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._streams: set[_StreamedResponse] = set()

    async def send(self, request: HttpRequest) -> HttpResponse:
        received = MockRequest(
            method=request.method,
            url=request.url,
            headers=wire.Headers(request.headers.items()),
            body=request.body or b"",
        )
        self._requests.append(received)
        try:
            answer = self._handler(received)
            if inspect.isawaitable(answer):
                answer = await self._run(answer)
        except (LLMError, OSError) as exc:
            raise _simulated_failure(exc, connect_timeout=request.connect_timeout) from exc
        return self._open(_as_response(answer, received))

    async def _run(self, answer: Awaitable[MockAnswer]) -> MockAnswer:
        if self._closed:
            raise faults.connection_failed(faults.BROKEN_BEFORE_RESPONSE)
        task = self._start(_await(answer))
        if isinstance(answer, Coroutine):
            # A task that was cancelled before its first step has not awaited the coroutine, and Python would warn.
            task.add_done_callback(lambda _: answer.close())
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            await end_task(task)
            raise
        if task.cancelled():
            raise faults.connection_failed(faults.BROKEN_BEFORE_RESPONSE)
        result: MockAnswer = task.result()
        return result

    def _open(self, response: MockResponse) -> HttpResponse:
        if response.events is None:
            return _WholeResponse(response)
        opened = _StreamedResponse(response)
        self._streams.add(opened)
        self._start(opened.run()).add_done_callback(lambda _: self._streams.discard(opened))
        return opened

    def _start(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(mark_exception_retrieved)
        return task

    def abandon(self) -> None:
        """Does nothing: there are no connections."""

    async def close(self) -> None:
        self._closed = True
        for stream in list(self._streams):
            stream.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class _WholeResponse:
    """An `HttpResponse` whose whole body is known from the beginning."""

    def __init__(self, response: MockResponse) -> None:
        body = response.body if response.json is None else wire.to_json(response.json)
        self.status = response.status
        self.headers: Mapping[str, str] = _with_content_type(
            response.headers, "text/plain" if response.json is None else "application/json"
        )
        self._unread = body.encode() if isinstance(body, str) else body

    async def read_some(self) -> bytes:
        return self.take_arrived()

    def take_arrived(self) -> bytes:
        unread, self._unread = self._unread, b""
        return unread

    def close(self) -> None:
        self._unread = b""


class _StreamedResponse:
    """An `HttpResponse` whose body comes from a generator.

    The generator runs in one task from its first event to its end, because timeouts and cancel scopes in it
    belong to one task, while a stream may be read by several tasks, one after the other.
    """

    def __init__(self, response: MockResponse) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = _with_content_type(response.headers, "text/event-stream")
        self._pieces = _encode_events(response.events or (), done=response.done)
        self._wanted = asyncio.Event()
        # The pieces of the body, and then an empty piece at its end, or the exception that ends it.
        self._arrived: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self._task: asyncio.Task[object] | None = None
        self._ended = False
        self._closed = False

    async def run(self) -> None:
        """Takes the next piece from the generator each time the reader waits for one."""
        self._task = asyncio.current_task()
        if self._closed:
            return
        try:
            async with aclosing(self._pieces) as pieces:
                while True:
                    await self._wanted.wait()
                    self._wanted.clear()
                    piece = await anext(pieces, b"")
                    self._arrived.put_nowait(piece)
                    if not piece:
                        return
        except Exception as exc:  # noqa: BLE001 - the reader gets whatever the generator raises
            self._arrived.put_nowait(exc)

    async def read_some(self) -> bytes:
        if self._ended:
            return b""
        if self._closed:
            raise self._connection_closed()
        self._wanted.set()
        piece = await self._arrived.get()
        if not isinstance(piece, Exception):
            self._ended = not piece
            return piece
        self._closed = True
        if isinstance(piece, LLMError | OSError):
            raise _simulated_failure(piece, status=self.status) from piece
        raise piece

    def take_arrived(self) -> bytes:
        pieces: list[bytes] = []
        while not self._arrived.empty():
            piece = self._arrived.get_nowait()
            if isinstance(piece, Exception):
                # An exception is the last thing that arrives.
                self._arrived.put_nowait(piece)
                break
            self._ended = not piece
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        if self._ended or self._closed:
            return
        self._closed = True
        self._arrived.put_nowait(self._connection_closed())
        if self._task is not None:
            self._task.cancel()

    def _connection_closed(self) -> ConnectionFailed:
        return faults.connection_failed(faults.BROKEN_IN_BODY, status=self.status)


async def _await(answer: Awaitable[MockAnswer]) -> MockAnswer:
    return await answer


def _as_response(answer: MockAnswer, request: MockRequest) -> MockResponse:
    """Converts the return value of a handler to a response.

    Raises:
        TypeError: A handler must not return a value of this type.
    """
    if isinstance(answer, MockResponse):
        return answer
    if isinstance(answer, Mapping):
        return MockResponse(json=answer)
    if isinstance(answer, Iterable | AsyncIterable) and not isinstance(answer, str | bytes):
        return MockResponse(events=answer)
    raise TypeError(
        f"the handler of a MockTransport returned {answer!r} for {request.method} {request.path};"
        " return a dict, a MockResponse, or the events of a stream"
    )


async def _encode_events(events: MockEvents, *, done: bool) -> AsyncGenerator[bytes, None]:
    """Yields the bytes of each event, and then `[DONE]` if `done` is set and the last event was not `[DONE]`."""
    last: MockEvent = ""
    async with aclosing(_iterate(events)) as iterator:
        async for event in iterator:
            last = event
            if event:
                yield _encode_event(event)
    if done and last != _DONE:
        yield _encode_event(_DONE)


async def _iterate(events: MockEvents) -> AsyncGenerator[MockEvent, None]:
    """Yields the events of any iterable, and closes the iterable if it can be closed."""
    try:
        if isinstance(events, AsyncIterable):
            async for event in events:
                yield event
        else:
            for event in events:
                yield event
    finally:
        if isinstance(events, AsyncIterable):
            aclose = getattr(events, "aclose", None)
            if aclose is not None:
                await aclose()
        else:
            close = getattr(events, "close", None)
            if close is not None:
                close()


def _encode_event(event: MockEvent) -> bytes:
    if isinstance(event, bytes):
        return event
    if isinstance(event, Mapping):
        return b"data: %b\n\n" % wire.to_json(event)
    if isinstance(event, str):
        return "".join(f"data: {line}\n" for line in event.split("\n")).encode() + b"\n"
    raise TypeError(f"a stream of a MockTransport consists of dicts, strings and bytes, not of {event!r}")


def _with_content_type(headers: Mapping[str, str], content_type: str) -> wire.Headers:
    given = wire.Headers(headers.items())
    return given if "Content-Type" in given else wire.Headers([*given.items(), ("Content-Type", content_type)])


def _simulated_failure(
    exc: LLMError | OSError, *, connect_timeout: float | None = None, status: int | None = None
) -> ConnectionFailed:
    """Returns the failure that a handler simulates by raising an exception.

    If the exception was raised in the middle of a body, `status` is the status of the response.
    """
    if status is not None and not isinstance(exc, LLMError):
        return faults.connection_failed(faults.BROKEN_IN_BODY, cause=exc, status=status)
    # A handler may raise the same error for every attempt, and each attempt adds its own context.
    return faults.failure_from(copy.copy(exc) if isinstance(exc, LLMError) else exc, connect_timeout=connect_timeout)
