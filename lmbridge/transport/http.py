"""One server origin: a pooled session, admission, retries. The only importer of `aiohttp`."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl as ssl_module
import warnings
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from functools import lru_cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import aiohttp
import attrs
from aiohttp.client_proto import ResponseHandler

from lmbridge._version import __version__
from lmbridge.config import (
    Limits,
    checked,
    checked_key,
    default_api_base,
    default_api_key,
    is_loopback,
    normalize_api_base,
)
from lmbridge.errors import LLMConnectionError, LLMError, LLMTimeoutError, TaskCancelledError
from lmbridge.transport.admission import Admission
from lmbridge.transport.calls import Call, Reply, Request
from lmbridge.transport.deadline import DeadlineTimer
from lmbridge.transport.events import EventStream
from lmbridge.transport.retry import Verdict
from lmbridge.transport.scheduler import Permit
from lmbridge.transport.sse import begins_event_stream

logger = logging.getLogger("lmbridge.transport")

if TYPE_CHECKING:
    from lmbridge.transport.stats import ClientStats

KEEPALIVE: Final = 4.0
"""Seconds that an idle socket is kept: LM Studio and llama.cpp drop theirs after 5."""

_SECRET_LENGTH: Final = 4  # a shorter key hides nothing, and would be found in every second word
_JSON: Final = {"Content-Type": "application/json"}
_BROKEN: Final = (aiohttp.ClientError, OSError)
_LOST: Final = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientConnectionResetError)
_NOT_BEGUN: Final = (429, 503)  # answers before any work
_NOT_REPEATED: Final = (
    "it was not sent again, because the server may have begun with it; look there before you repeat it"
)
_T = TypeVar("_T")
FindLimits = Callable[["Transport"], Awaitable[Limits]]
_Receive = Callable[[Call, aiohttp.ClientResponse], Awaitable[_T]]


class Transport:
    """Connections to one server, and the order in which they are used.

    Clients that share a transport share its limits. It opens with its first request, in the loop of that request;
    `close` returns it to unopened.

    Args:
        api_base: The server, with or without `/v1`. Default: `LMBRIDGE_API_BASE`, else `LMSTUDIO_HOST` and
            `LMSTUDIO_PORT`, else `http://127.0.0.1:1234/v1`.
        api_key: Sent as a bearer token. Default: `LM_API_TOKEN`.
        limits: How much may be going on at a time; or a function that finds it out. That is called before the first
            request, and again after a connection was refused or lost, for then the server may be another.
        ssl: A context for https in place of the default verification.
        trust_env: Whether to use the environment's proxies and netrc. Loopback is never proxied.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    def __init__(
        self,
        api_base: str | None = None,
        *,
        api_key: str | None = None,
        limits: Limits | FindLimits | None = None,
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
    ) -> None:
        self.api_base: Final = normalize_api_base(default_api_base() if api_base is None else api_base)
        self._root = self.api_base.rpartition("/")[0]
        self.api_key: Final = checked_key(default_api_key() if api_key is None else api_key)
        self._find_limits = limits if callable(limits) else None
        self.limits = Limits() if limits is None or callable(limits) else checked("limits", limits, Limits)
        self._ssl = None if ssl is None else checked("ssl", ssl, ssl_module.SSLContext)
        self._trust_env = trust_env and not is_loopback(self.api_base)
        self._secret = None if self.api_key is None else _as_written(self.api_key)
        self._opened: _Opened | None = None
        self._retries: Counter[str | None] = Counter()
        self._swaps: Counter[str | None] = Counter()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.api_base}>"

    def __del__(self) -> None:
        if getattr(self, "_opened", None) is not None:
            warnings.warn(f"unclosed {self!r}; close its client, or use `async with`", ResourceWarning, 2, source=self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def stats(self) -> ClientStats:
        """What is going on, and the counts since this transport was made."""
        from lmbridge.transport.stats import ClientStats, ModelStats  # noqa: PLC0415 - a millisecond for whom asks

        admission = None if self._opened is None else self._opened.admission
        in_flight = Counter(permit.model for permit in admission.scheduler.in_flight) if admission else Counter()
        queued = Counter(permit.model for permit in admission.scheduler.waiting) if admission else Counter()
        models = dict.fromkeys([*self._retries, *self._swaps, *in_flight, *queued])
        return ClientStats(
            in_flight=in_flight.total(),
            queued=queued.total(),
            swaps=self._swaps.total(),
            retries=self._retries.total(),
            by_model={
                model: ModelStats(
                    in_flight=in_flight[model],
                    queued=queued[model],
                    swaps=self._swaps[model],
                    retries=self._retries[model],
                )
                for model in models
            },
        )

    @property
    def in_flight(self) -> int:
        """Generations under way."""
        return self._opened.admission.in_flight if self._opened else 0

    @property
    def queued(self) -> int:
        """Generations that wait for a permit."""
        return self._opened.admission.queued if self._opened else 0

    @property
    def busy(self) -> bool:
        """Whether any request is under way or waits."""
        opened = self._opened
        return opened is not None and bool(opened.requests or opened.admission.in_flight or opened.admission.queued)

    @property
    def closing(self) -> asyncio.Future[None] | None:
        """Done once what is open now is closed; None if nothing is."""
        return None if self._opened is None else self._opened.closed

    def redact(self, text: str) -> str:
        """The text without the key, which some servers repeat in their errors."""
        return text if self._secret is None else self._secret.sub("[api_key]", text)

    # These two are no coroutines themselves: each that waits is one more object for the garbage collector to look at.

    def request(self, request: Request) -> Coroutine[Any, Any, Reply]:
        """Sends a request and reads its whole answer.

        Raises:
            LLMConnectionError: nobody there, or the connection broke.
            LLMTimeoutError: a limit ran out.
            TaskCancelledError: the transport was closed meanwhile.
        """
        return self._perform(request, _receive_reply)

    def stream(self, request: Request) -> Coroutine[Any, Any, EventStream | Reply]:
        """Sends a request for an event stream; an answer that is none comes as a whole `Reply`.

        The event stream owns the request's permit until it is closed.

        Raises:
            LLMConnectionError: nobody there, or the connection broke.
            LLMTimeoutError: a limit ran out.
            TaskCancelledError: the transport was closed meanwhile.
        """
        return self._perform(request, _receive_events)

    async def close(self) -> None:
        """Ends what is in flight with `TaskCancelledError` and closes every connection; idempotent.

        Raises:
            LLMError: it is open in another loop that is still alive.
        """
        opened, self._opened = self._opened, None
        if opened is None:
            return
        if opened.loop.is_closed():
            _warn_of_closed_loop()
        elif opened.loop is not asyncio.get_running_loop():
            self._opened = opened
            raise _wrong_loop()
        else:
            await opened.close()

    # One request

    async def _perform(self, request: Request, receive: _Receive[_T]) -> _T | Reply:
        opened = self._open()
        url = f"{self._root if request.below_root else self.api_base}{request.path}"
        opened.requests += 1
        try:
            permit = None
            if request.queued:
                self._retries.setdefault(request.model, 0)  # `stats` tells of each model that was asked for
                if self._find_limits is not None and not opened.knows_limits:
                    await self._know_limits(opened, self._find_limits)
                plain = receive is _receive_reply
                permit = opened.admission.acquire_now(request.model, plain=plain) or await self._queue(
                    opened, request, url, plain=plain
                )
            call = Call(request, url, opened.admission, permit, opened.deadline_timer)
            try:
                answer = await self._attempt(opened, call, receive)
                while isinstance(answer, _Failure) or (isinstance(answer, Reply) and answer.status >= 400):
                    wait = None if opened.closed.done() else self._wait_before_next(call, answer)
                    if wait is None:
                        break
                    await asyncio.wait((opened.closed,), timeout=wait)
                    answer = await self._attempt(opened, call, receive)
                if isinstance(answer, EventStream):
                    self._keep(opened, answer)
                    return answer
                if isinstance(answer, _Failure):
                    raise _cancelled(call) if opened.closed.done() else answer.error
                if isinstance(answer, Reply) and answer.status < 400:
                    call.note_first_event(answer.body)
            except BaseException:
                call.release()
                raise
            call.release()
            return answer
        finally:
            opened.requests -= 1

    async def _know_limits(self, opened: _Opened, find: FindLimits) -> None:
        if opened.finding is None:
            opened.finding = opened.loop.create_task(self._look_for_limits(opened, find))
        finding = opened.finding
        await asyncio.wait((finding,))  # who is cancelled meanwhile leaves it to the others
        if finding.cancelled():
            raise TaskCancelledError("the client was closed while it asked for the server's limits")
        finding.result()

    async def _look_for_limits(self, opened: _Opened, find: FindLimits) -> None:
        try:
            limits = await find(self)
        except LLMError as error:
            opened.knows_limits = error.status is not None and error.status < 500  # it answered, and will not say more
            if not opened.closed.done():
                logger.warning("the server's limits are not known, so they stay %s: %s", self.limits, error)
        else:
            if limits != self.limits:
                logger.info("the server's limits: %s", limits)
                self.limits = limits
                opened.admission.set_limits(limits)
            opened.knows_limits = True
        finally:
            opened.finding = None

    async def _queue(self, opened: _Opened, request: Request, url: str, *, plain: bool) -> Permit:
        try:
            return await opened.admission.acquire(request.model, plain=plain)
        except LLMError as error:
            error.context = {"operation": request.operation, "url": url, "model": request.model, **error.context}
            raise

    def _keep(self, opened: _Opened, stream: EventStream) -> None:
        """Hands a stream over, with its permit."""
        if opened.closed.done():
            stream.abort()
            raise _cancelled(stream.call)
        stream.call.request.body = None  # it is not sent again, and a thousand open streams may have long prompts
        opened.streams.add(stream)

    def _wait_before_next(self, call: Call, answer: Reply | _Failure) -> float | None:
        """Seconds to wait before the next attempt, or None if this answer stands."""
        if isinstance(answer, _Failure):
            verdict, retry_after, why = answer.verdict, None, answer.error.message
            repeatable = call.request.repeatable or answer.unsent
        else:
            verdict = call.request.classify(answer.status, answer.headers, answer.body)
            retry_after, why = answer.retry_after, f"status {answer.status}"
            repeatable = call.request.repeatable or answer.status in _NOT_BEGUN
        if verdict is Verdict.RETRY and not repeatable:
            if isinstance(answer, _Failure):
                answer.error.hint = _NOT_REPEATED
            return None
        try:
            wait = call.wait_before_next(verdict, retry_after)
        except LLMTimeoutError as error:
            if isinstance(answer, Reply):
                error.status, error.body = answer.status, self.redact(answer.body.decode("utf-8", "replace"))
            raise
        if wait is not None:
            self._retries[call.request.model] += verdict is Verdict.RETRY
            logger.info("%s: %s; %s in %.2f s", call.request.operation, why, verdict.value, wait)
        return wait

    async def _attempt(self, opened: _Opened, call: Call, receive: _Receive[_T]) -> _T | Reply | _Failure:
        if opened.closed.done():
            raise _cancelled(call)
        session = opened.session if call.request.repeatable else opened.fresh_session(self._session)
        caught: Exception
        response: aiohttp.ClientResponse | None = None
        try:
            with call.begin_attempt():
                newest = _newest.get()
                try:
                    response = await _send(session, call)
                except _LOST as exc:
                    # Once more, at once, if a kept connection turned out to be dead before any byte of a reply.
                    begun = not isinstance(getattr(exc, "message", ""), str)  # it has the part of a head that came
                    if begun or _newest.get() is not newest or opened.closed.done():
                        raise
                    opened.knows_limits = False
                    response = await _send(session, call)
                try:
                    return await receive(call, response)
                except BaseException:
                    response.close()
                    raise
        except (*_BROKEN, ValueError) as exc:  # a ValueError: a netrc's password beside our key, for one
            caught = exc
        except asyncio.CancelledError:
            # A session that closes cancels what waits for a connection or a name: that is no cancel by the caller.
            task = asyncio.current_task()
            if not opened.closed.done() or (task is not None and task.cancelling()):
                raise
            caught = ConnectionAbortedError()
        # Out of the handler, so that no error's context leads to an exception of aiohttp's that holds our headers.
        failure = _failure(call, caught, self.redact)
        if failure.verdict is Verdict.RETRY:
            opened.knows_limits = False
        failure.error.status = response.status if response is not None else None
        return failure

    # The session

    def _open(self) -> _Opened:
        loop = asyncio.get_running_loop()
        opened = self._opened
        if opened is not None and opened.loop is not loop:
            if not opened.loop.is_closed():
                raise _wrong_loop()
            _warn_of_closed_loop()
            opened = None
        if opened is None:
            opened = self._opened = _Opened(loop, self._session(), Admission(self.limits, self._swaps))
        return opened

    def _session(self, *, keep: bool = True) -> aiohttp.ClientSession:
        headers = {"User-Agent": f"lmbridge/{__version__}"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        session = aiohttp.ClientSession(
            # The scheduler is the queue; the two more are for what does not queue (health, model lists).
            connector=_Connector(
                limit=0 if self._find_limits is not None else self.limits.max_concurrency + 2,
                ssl=self._ssl or True,
                **({"keepalive_timeout": KEEPALIVE} if keep else {"force_close": True}),
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),  # aiohttp's own default cuts every answer at 300 s
            trust_env=self._trust_env,
        )
        session._retry_connection = False  # noqa: SLF001 - it sends a GET again on fresh connections, too; we do not
        return session


@attrs.define(eq=False)
class _Opened:
    """What lives in one event loop."""

    loop: asyncio.AbstractEventLoop
    session: aiohttp.ClientSession
    admission: Admission
    closed: asyncio.Future[None] = attrs.field(init=False)
    streams: weakref.WeakSet[EventStream] = attrs.field(init=False, factory=weakref.WeakSet)
    requests: int = attrs.field(init=False, default=0)
    """Plain ones under way, queued or not."""
    deadline_timer: DeadlineTimer = attrs.field(init=False)
    knows_limits: bool = attrs.field(init=False, default=False)
    finding: asyncio.Task[None] | None = attrs.field(init=False, default=None)
    _fresh: aiohttp.ClientSession | None = attrs.field(init=False, default=None)

    @closed.default
    def _unclosed(self) -> asyncio.Future[None]:
        return self.loop.create_future()

    @deadline_timer.default
    def _make_deadline_timer(self) -> DeadlineTimer:
        return DeadlineTimer(self.loop, self.streams)

    def fresh_session(self, make: Callable[..., aiohttp.ClientSession]) -> aiohttp.ClientSession:
        """For what must not be sent twice: a kept connection may be dead, and only the sending would tell."""
        if self._fresh is None:
            self._fresh = make(keep=False)
        return self._fresh

    async def close(self) -> None:
        self.closed.set_result(None)
        for stream in list(self.streams):
            stream.abort(_cancelled(stream.call))
        self.admission.fail_waiters(lambda: TaskCancelledError("the client was closed while it was queued"))
        try:
            if self.finding is not None:
                self.finding.cancel()
                await asyncio.wait((self.finding,))
        finally:
            await self._close_sessions()

    async def _close_sessions(self) -> None:
        try:
            await self.session.close()
        finally:
            if self._fresh is not None:
                await self._fresh.close()
            self.deadline_timer.close()


class _Failure:
    """An attempt without an answer."""

    def __init__(self, error: LLMError, verdict: Verdict, *, unsent: bool = False) -> None:
        self.error = error
        self.verdict = verdict
        self.unsent = unsent
        """Whether the server has seen nothing of the request."""


def _send(session: aiohttp.ClientSession, call: Call) -> Awaitable[aiohttp.ClientResponse]:
    request = call.request
    return session.request(
        request.method,
        call.url,
        data=request.body,
        headers=_JSON if request.body is not None else None,
        allow_redirects=False,
        timeout=_client_timeout(request.timeouts.connect),
    )


async def _receive_reply(call: Call, response: aiohttp.ClientResponse) -> Reply:
    body = await response.read()
    return Reply(call=call, status=response.status, headers=response.headers, body=body)


async def _receive_events(call: Call, response: aiohttp.ClientResponse) -> EventStream | Reply:
    if response.status >= 300:
        return await _receive_reply(call, response)
    if response.headers.get("Content-Type", "").lower().startswith("text/event-stream"):
        return _event_stream(call, response)
    # Mislabelled, or no stream at all (an error with status 200, a plain completion): its first bytes tell.
    first = b""
    while (known := begins_event_stream(first)) is None and (more := await response.content.readany()):
        first += more
    if known:
        return _event_stream(call, response, first)
    reply = await _receive_reply(call, response)
    reply.body = first + reply.body
    return reply


_newest: ContextVar[object] = ContextVar("lmbridge_newest", default=None)
"""Stands for the newest connection that was made for this task: no other than before, and a kept one was used."""


def _event_stream(call: Call, response: aiohttp.ClientResponse, first: bytes = b"") -> EventStream:
    stream = EventStream(call, response, _BROKEN, first)
    if call.permit is not None and call.permit.is_first_request and stream.look() and response.connection is not None:
        protocol = response.connection.protocol
        if isinstance(protocol, _Protocol):
            protocol.look = weakref.WeakMethod(stream.look)
    return stream


class _Protocol(ResponseHandler):
    """Lets a stream that nobody reads know that something has arrived, or that nothing will, if others wait for it.

    And tells the reader of a body that its connection is gone, which aiohttp forgets after an error of framing.
    """

    look: weakref.WeakMethod[Callable[[], bool]] | None = None
    _was_paused = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.look is not None:
            self._let_look()

    def pause_reading(self) -> None:
        self._was_paused = True
        super().pause_reading()

    def resume_reading(self, *how: Any, **more: Any) -> None:
        # aiohttp 3.14 asks for it with each HTTP chunk that is read, and goes through the parser and the transport each
        # time: a microsecond for each chunk of a stream. What was never paused has nothing to resume. What was may
        # have, though it does not say so: paused between two HTTP chunks, the parser stops only after the next one.
        if self._was_paused:
            super().resume_reading(*how, **more)

    def connection_lost(self, exc: BaseException | None) -> None:
        payload = getattr(self, "_payload", None)
        super().connection_lost(exc)
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(aiohttp.ClientPayloadError("the framing of the body is broken"))
        self._let_look()

    def _let_look(self) -> None:
        if self.look is not None:
            look = self.look()
            if look is None or not look():
                self.look = None


class _Connector(aiohttp.TCPConnector):
    """Notes when it makes a connection. aiohttp's tracing tells that as well, at 10 microseconds a request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = partial(_Protocol, loop=self._loop)  # type: ignore[assignment]  # of its own subclass

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        _newest.set(object())
        return await super()._create_connection(req, traces, timeout)


@lru_cache(maxsize=16)
def _client_timeout(connect: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=connect)


# Errors

_START: Final = "start the server there, or pass the right api_base"
# What aiohttp raises, most specific first: what it means, whether to try again, what to do.
_FAILURES: Final[tuple[tuple[type[Exception], str, Verdict, str | None], ...]] = (
    (aiohttp.ClientConnectorDNSError, "the host name cannot be resolved", Verdict.FAIL, "check api_base"),
    (
        aiohttp.ClientConnectorCertificateError,
        "the server's certificate is not trusted",
        Verdict.FAIL,
        "pass ssl=ssl.create_default_context(cafile=...) with the authority that signed it",
    ),
    (aiohttp.ClientSSLError, "no TLS connection", Verdict.FAIL, "check whether api_base is https or http"),
    (aiohttp.ClientProxyConnectionError, "the proxy cannot be reached", Verdict.RETRY, "check HTTP(S)_PROXY"),
    (aiohttp.ClientConnectorError, "could not connect", Verdict.RETRY, _START),
    (
        aiohttp.ServerDisconnectedError,
        "the server closed the connection without an answer",
        Verdict.RETRY,
        None,
    ),
    (aiohttp.ClientPayloadError, "the connection broke in the middle of the answer", Verdict.FAIL, None),
    (aiohttp.ClientResponseError, "what answers there does not speak proper HTTP", Verdict.FAIL, _START),
    (aiohttp.ClientConnectionError, "the connection broke before an answer", Verdict.RETRY, None),
    (OSError, "the connection broke before an answer", Verdict.RETRY, None),
    (Exception, "the request could not be sent", Verdict.FAIL, None),
)


def _failure(call: Call, exc: Exception, redact: Callable[[str], str]) -> _Failure:
    if isinstance(exc, aiohttp.ConnectionTimeoutError):
        return _Failure(call.timed_out("connect", exc), Verdict.FAIL)
    if isinstance(exc, TimeoutError):
        total = call.first_byte_deadline == call.total_deadline
        return _Failure(call.timed_out("total" if total else "first_byte", exc), Verdict.FAIL)
    _, what, verdict, hint = next(row for row in _FAILURES if isinstance(exc, row[0]))
    cause: BaseException | None = exc
    if isinstance(exc, aiohttp.ClientResponseError):
        cause = exc.__cause__  # aiohttp's own exception has our request's headers in its repr
    if redact(repr(cause)) != repr(cause):
        cause = None  # a parser's errors quote the server, which may have quoted the key
    reason = redact(_reason(exc))
    error = LLMConnectionError(f"{what}: {reason}" if reason else what, cause, hint=hint, context=call.context())
    return _Failure(error, verdict, unsent=isinstance(exc, aiohttp.ClientConnectorError))


def _reason(exc: Exception) -> str:
    """What the exception adds to what its class says, in words for people."""
    if isinstance(exc, aiohttp.ClientResponseError):
        return exc.message
    if isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return ""
    if isinstance(exc, aiohttp.ClientConnectorError):
        exc = exc.os_error
    if isinstance(exc, ssl_module.SSLError):  # its errno is OpenSSL's, not the system's
        return exc.reason or str(exc)
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno)
    return str(exc) or type(exc).__name__


def _as_written(key: str) -> re.Pattern[str] | None:
    r"""Finds a key in a text, also as JSON may write it: with `\/`, or with `\u002B` for a plus."""
    if len(key) < _SECRET_LENGTH:
        return None
    return re.compile("".join(rf"(?:{re.escape(c)}|\\{re.escape(c)}|\\u00(?i:{ord(c):02x}))" for c in key))


def _cancelled(call: Call) -> TaskCancelledError:
    return TaskCancelledError("the client was closed meanwhile", context=call.context())


def _warn_of_closed_loop() -> None:
    # Nothing of that session can be closed properly any more; its sockets are closed when it is collected.
    warnings.warn(
        "an lmbridge client was not closed before its event loop was; close it in the loop that used it",
        ResourceWarning,
        stacklevel=4,
    )


def _wrong_loop() -> LLMError:
    return LLMError(
        "this client is open in another event loop that is still alive",
        hint="make one client for each loop, or close() this one in the loop that used it first",
    )
