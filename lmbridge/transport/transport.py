"""Sends requests to one server, and decides when each is admitted, how often it is sent, and how long it may take.

`Transport._perform` takes a request through three steps:

1. *Admission*: a generation waits for a permit from the scheduler. Model lists and health checks do not.
2. *Attempts*: the request is sent, and sent again as long as the failure is one that a further attempt may overcome.
3. *The reply*: when `request` returns, the reply is complete and the permit has been returned. The `EventStream` that
   `stream` returns holds the permit until it is closed.

These alternatives were considered. Retries in a decorator around all three steps would return the permit between two
attempts, so a server that is loading one model could get a request for another one in the meantime. Retries inside the
HTTP session could not take the total time limit into account. A separate task for each request, which `close` could
cancel, would cost more than all other bookkeeping of a request; instead, `close` closes the session, which wakes every
task that waits for a response.

The transport does not send anything itself: it uses the interface in `lmbridge.transport.http`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl as ssl_module
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from lmbridge._checks import check_instance, check_integer
from lmbridge._copying import NotCopyable
from lmbridge._text import redacted_beginning
from lmbridge._version import __version__
from lmbridge.config import (
    Limits,
    check_api_key,
    check_auth,
    default_api_base,
    default_api_key,
    environment_proxy,
    is_loopback,
    normalize_api_base,
    socket_path_of,
    split_credentials,
)
from lmbridge.errors import LLMError, LLMTimeoutError, LLMValidationError
from lmbridge.transport.admission import Admission
from lmbridge.transport.calls import MAX_REPLY_BYTES, Call, Reply, Request
from lmbridge.transport.events import EventStream
from lmbridge.transport.evictions import Evictions
from lmbridge.transport.forwarding import ForwardedResponse, receive_forwarded
from lmbridge.transport.headers import (
    add_query,
    basic_auth,
    check_headers,
    merge_headers,
    secret_pattern,
    secrets_in,
)
from lmbridge.transport.http import ConnectionFailed, HttpRequest, HttpResponse, HttpSession, StaleConnection
from lmbridge.transport.limit_search import LimitFinder, LimitSearch, as_finder
from lmbridge.transport.open_state import OpenState, closed_error
from lmbridge.transport.options import api_roots, check_any_proxy, choose_auth, own_secrets
from lmbridge.transport.receive import receive_begun_stream, receive_reply, receive_stream
from lmbridge.transport.retry import Verdict
from lmbridge.transport.schedule_view import ScheduledModel, Swap, models_in
from lmbridge.transport.session import AiohttpSession

if TYPE_CHECKING:
    from lmbridge.transport.stats import ClientStats

logger: logging.Logger = logging.getLogger("lmbridge.transport")

_EXTRA_CONNECTIONS: Final = 2
"""The number of connections beyond `max_concurrency`. They are for requests that do not need a permit."""
_REFUSED_BEFORE_WORK: Final = (429, 503)
"""The statuses with which a server refuses a request before it starts to work on it."""
_ENVIRONMENT_PROXY: Final = "HTTP_PROXY or HTTPS_PROXY in the environment"
_SSL_HINT: Final = "to trust a certificate of your own, pass ssl.create_default_context(cafile='ca.pem')"
_NOT_RESENT_HINT: Final = (
    "the request was not sent again, because the server may have started to work on it;"
    " check its effect before you repeat it"
)

_T = TypeVar("_T")
FindLimits = Callable[["Transport"], Awaitable[Limits]]
"""An async function that asks the server of a transport how many requests and models it can handle at the same time."""
_Receive = Callable[[Call, HttpResponse], Awaitable[_T]]


class Transport(NotCopyable):
    """The connections to one server, and the schedule by which they are used.

    By default each client creates its own transport. Pass the same one to several clients if they should share its
    limits::

        async with Transport("http://127.0.0.1:1234", limits=Limits(max_loaded_models=1)) as transport:
            writer = LLMClient(transport=transport, model="qwen3-4b")
            critic = LLMClient(transport=transport, model="gemma-3-4b")

    A transport opens with its first request, in the event loop of that request. After `close`, another request opens it
    again, which may happen in another event loop.

    Args:
        api_base: The URL of the server, with or without `/v1`. By default it comes from the environment:
            `LMBRIDGE_API_BASE`, else `LMSTUDIO_HOST` and `LMSTUDIO_PORT`, else it is `http://127.0.0.1:1234/v1`.
        api_key: The key that is sent as a bearer token. By default it is the environment variable `LM_API_TOKEN`.
        limits: How many requests and models may be in flight at the same time (by default `Limits()`), or an async
            function that asks the server. The function is called before the first request, and again after a
            connection was refused or lost, because a different server may be running by then. A `LimitFinder` says more
            about when it is called.
        headers: Headers that are sent with every request. They replace headers of lmbridge that have the same name.
            Errors and logs never contain their values.
        auth: A user and a password for basic authentication, which is used instead of a key. They can also be a part of
            `api_base`.
        proxy: The URL of an HTTP proxy, which may contain a user and a password, or of a SOCKS proxy if the package
            aiohttp-socks is installed. By default no proxy is used.
        ssl: The TLS context for https. By default aiohttp's default context is used.
        trust_env: Whether the proxies and the `.netrc` file of the environment are used. By default they are not. A
            loopback address is never reached through a proxy.
        max_reply_bytes: The most bytes that a whole reply or the body of an error may have, after decompression; a
            larger one is an `LLMResponseError`. Streams are not limited. The default is 256 MiB.

    Raises:
        LLMValidationError: An argument cannot be used.
    """

    _instead_of_a_copy = "pass the transport itself on, and create another one in each process"

    def __init__(
        self,
        api_base: str | None = None,
        *,
        api_key: str | None = None,
        limits: Limits | LimitFinder | FindLimits | None = None,
        headers: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        proxy: str | None = None,
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        max_reply_bytes: int | None = None,
    ) -> None:
        url, url_auth = split_credentials(default_api_base() if api_base is None else api_base)
        self.api_base: Final = normalize_api_base(url)
        self._socket_path = socket_path_of(self.api_base)
        self._api_root, self._server_root = api_roots(self.api_base)
        auth = choose_auth(check_auth(auth), url_auth, api_key)
        if api_key is None and auth is None:
            api_key = default_api_key()
        self.api_key: Final = check_api_key(api_key)
        self._proxy = check_any_proxy(proxy, "proxy")
        if self._proxy is not None and self._socket_path is not None:
            raise LLMValidationError("a Unix socket cannot be reached through a proxy", hint="leave out proxy=")
        self._limit_finder = as_finder(limits)
        given: Any = limits if self._limit_finder is None else self._limit_finder.until_known
        self._limits = Limits() if given is None else check_instance("limits", given, Limits)
        self._ssl = check_instance("ssl", ssl, ssl_module.SSLContext, optional=True, hint=_SSL_HINT)
        self._trust_env = trust_env and self._socket_path is None and not is_loopback(self.api_base)
        if self._trust_env and self._proxy is None:
            # aiohttp finds the proxy for each request anew, but takes every URL for that of an HTTP proxy, and goes
            # without a proxy whose URL begins with https://.
            found = environment_proxy(self.api_base)
            self._proxy = None if (found or "").startswith("http://") else check_any_proxy(found, _ENVIRONMENT_PROXY)
        check_integer("max_reply_bytes", max_reply_bytes, optional=True)
        self._max_reply_bytes = MAX_REPLY_BYTES if max_reply_bytes is None else max_reply_bytes
        given_headers = check_headers("headers", headers)
        self._key_pattern = secret_pattern(own_secrets(self.api_key, auth, self._proxy))
        self._header_pattern = secret_pattern(secrets_in(given_headers))
        self._headers = {"User-Agent": f"lmbridge/{__version__}"}
        if self.api_key is not None:
            self._headers["Authorization"] = f"Bearer {self.api_key}"
        elif auth is not None:
            self._headers["Authorization"] = basic_auth(*auth)
        self._headers = merge_headers(self._headers, given_headers)
        self._json_headers = merge_headers({"Content-Type": "application/json"}, self._headers)
        self._open_state: OpenState | None = None
        self._retries: Counter[str | None] = Counter()
        self._swaps: Counter[str | None] = Counter()
        self._evictions = Evictions()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.api_base}>"

    def __del__(self) -> None:
        state: OpenState | None = getattr(self, "_open_state", None)
        if state is not None:
            warnings.warn(f"unclosed {self!r}; close its client, or use `async with`", ResourceWarning, 2, source=self)
            state.abandon()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def open_session(self) -> HttpSession:
        """Creates the session that sends the requests. It is called when the transport opens, in its event loop.

        Override it to send requests by other means than a socket, as `lmbridge.testing.MockTransport` does.
        """
        # Requests wait in the scheduler, not in the connection pool. If the server has yet to be asked for its limits,
        # the size of the pool is not limited.
        limit = None if self._limit_finder is not None else self._limits.max_concurrency + _EXTRA_CONNECTIONS
        return AiohttpSession(
            connection_limit=limit,
            ssl=self._ssl,
            trust_env=self._trust_env,
            proxy=self._proxy,
            socket_path=self._socket_path,
        )

    # The current state

    def stats(self) -> ClientStats:
        """Returns how many requests are in flight and queued now, and how many swaps and retries there were so far."""
        # Imported here because the import takes a millisecond, and most programs never call this method.
        from lmbridge.transport.stats import ClientStats, ModelStats, ServerStats  # noqa: PLC0415

        scheduler = None if self._open_state is None else self._open_state.admission.scheduler
        in_flight = Counter(permit.model for permit in scheduler.in_flight) if scheduler else Counter()
        queued = Counter(permit.model for permit in scheduler.waiting) if scheduler else Counter()
        models = dict.fromkeys([*self._retries, *self._swaps, *in_flight, *queued])
        by_model = {
            model: ModelStats(
                in_flight=in_flight[model],
                queued=queued[model],
                swaps=self._swaps[model],
                retries=self._retries[model],
                evictions=self._evictions.counts[model],
            )
            for model in models
        }
        numbers = ServerStats(
            in_flight=in_flight.total(),
            queued=queued.total(),
            swaps=self._swaps.total(),
            retries=self._retries.total(),
            evictions=self._evictions.counts.total(),
            limits=self.limits,
            by_model=by_model,
        )
        return ClientStats(
            in_flight=numbers.in_flight,
            queued=numbers.queued,
            swaps=numbers.swaps,
            retries=numbers.retries,
            evictions=numbers.evictions,
            by_model=by_model,
            by_server={self.api_base: numbers},
        )

    def scheduled_models(self) -> list[ScheduledModel]:
        """Returns the models that have requests, or that the schedule takes for loaded."""
        return [] if self._open_state is None else models_in(self._open_state.admission.scheduler)

    def recent_swaps(self) -> list[Swap]:
        """Returns the latest swaps since the transport was opened, in order."""
        return [] if self._open_state is None else list(self._open_state.admission.scheduler.recent_swaps)

    @property
    def has_credentials(self) -> bool:
        """Whether requests have a header with a key that belongs to the transport."""
        return any(name.lower() in ("authorization", "x-api-key") for name in self._headers)

    @property
    def limits(self) -> Limits:
        """The limits that are in force.

        If the server has to be asked, they are the defaults until it has answered. If it has killed a generation to
        load another model, `max_loaded_models` is not more than it held at that time.
        """
        return self._evictions.lowered(self._limits)

    @property
    def in_flight(self) -> int:
        """The number of generations in flight."""
        return self._open_state.admission.in_flight if self._open_state else 0

    @property
    def queued(self) -> int:
        """The number of generations that are waiting for a permit."""
        return self._open_state.admission.queued if self._open_state else 0

    @property
    def busy(self) -> bool:
        """Whether a request or a stream is in flight, or a request is waiting."""
        state = self._open_state
        return state is not None and bool(state.requests or state.admission.in_flight or state.admission.queued)

    @property
    def nodes(self) -> tuple[Transport, ...]:
        """This transport, which is the only one."""
        return (self,)

    @property
    def active_models(self) -> frozenset[str | None] | None:
        """The models that have, or had last, requests in flight; None if `Limits.max_loaded_models` is not set."""
        if self._open_state is None or self.limits.max_loaded_models is None:
            return None
        return self._open_state.admission.scheduler.active_models

    def owns_url(self, url: str) -> bool:
        """Returns whether a URL is that of a request to the server of this transport."""
        return url.startswith(f"{self._server_root}/")

    @property
    def closing(self) -> asyncio.Future[None] | None:
        """A future that is done once the open transport begins to close; None if the transport is not open."""
        return None if self._open_state is None else self._open_state.closed

    def redact(self, text: str, headers: Mapping[str, str] | None = None) -> str:
        """Returns the text with "[api_key]" in place of the key, which some servers quote in their errors.

        Args:
            text: A text for an error or a log line.
            headers: The headers of one request. Their values are replaced by "[header]".
        """
        if self._key_pattern is not None:
            text = self._key_pattern.sub("[api_key]", text)
        if self._header_pattern is not None:
            text = self._header_pattern.sub("[header]", text)
        if headers and (pattern := secret_pattern(secrets_in(headers))) is not None:
            text = pattern.sub("[header]", text)
        return text

    # Requests

    async def request(self, request: Request) -> Reply:
        """Sends a request, and returns the complete reply, whatever its status.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMConnectionError: The server cannot be reached, or the connection broke.
            LLMTimeoutError: A time limit has run out.
            TaskCancelledError: The transport was closed before the reply was complete.
        """
        return await self._perform(self._ensure_open(), request, receive_reply, plain=True)

    async def stream(self, request: Request) -> EventStream | Reply:
        """Sends a request for an event stream, and returns the stream. It holds the permit until it is closed.

        If the response is not an event stream, it is read to its end and returned as a `Reply`.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMConnectionError: The server cannot be reached, or the connection broke.
            LLMTimeoutError: A time limit has run out.
            TaskCancelledError: The transport was closed before the response had begun.
        """
        state = self._ensure_open()
        receive = receive_stream if request.failover is None else receive_begun_stream
        answer = await self._perform(state, request, receive, plain=False)
        if isinstance(answer, EventStream):
            state.adopt(answer)
        return answer

    async def forward(self, request: Request) -> ForwardedResponse:
        """Sends a request whose response is passed on as it is, and returns the response, whatever its status.

        The request is admitted, sent again and polled for like any other. The response is returned when the first part
        of its body has arrived, and its body is not decompressed; `lmbridge.transport.forwarding` has the details. It
        holds the permit until its body has been read to the end, or until it is closed.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMConnectionError: The server cannot be reached, or the connection broke before the response had begun.
            LLMTimeoutError: A time limit has run out.
            LLMResponseError: The body of an error has more bytes than `max_reply_bytes`.
            TaskCancelledError: The transport was closed before the response had begun.
        """
        request.keeps_compression = True
        state = self._ensure_open()
        answer = await self._perform(state, request, receive_forwarded, plain=False)
        if isinstance(answer, Reply):
            return ForwardedResponse.from_reply(answer)
        state.adopt(answer)
        return answer

    async def close(self) -> None:
        """Ends every request and stream with a `TaskCancelledError`, and closes all connections.

        Closing a transport that is not open does nothing.

        Raises:
            LLMError: The transport is open in another event loop that is still alive.
        """
        state = self._open_state
        if state is None:
            return
        state.loop_guard.check()
        self._open_state = None
        if state.loop.is_closed():
            _warn_about_closed_loop()
            state.abandon()
        else:
            await state.close()

    # One request

    async def _perform(self, state: OpenState, request: Request, receive: _Receive[_T], *, plain: bool) -> _T | Reply:
        url = f"{self._server_root if request.below_root else self._api_root}{request.path}"
        call = Call(request, url, state.admission, state.deadline_timer, self._max_reply_bytes)
        state.requests += 1
        try:
            if request.queued:
                await self._admit(state, call, plain=plain)
                if request.failover is not None:
                    request.failover.on_admission(call)
            answer = await self._attempt_until_final(state, call, receive)
        except BaseException as exc:
            # Whatever ends the call, a cancellation included, its permit has to be returned.
            call.finish(type(exc).__name__)
            raise
        finally:
            state.requests -= 1
        if isinstance(answer, Reply):
            _finish_with_reply(call, answer)
        return answer

    async def _admit(self, state: OpenState, call: Call, *, plain: bool) -> None:
        """Waits for a permit, and gives it to the call."""
        model, priority = call.request.model, call.request.priority
        # This makes `stats` list every model that was ever requested.
        self._retries.setdefault(model, 0)
        search = state.limit_search
        if search is not None and not search.is_over:
            await search.wait(partial(self._ask_for_limits, state))
        permit = state.admission.acquire_now(model, plain=plain, priority=priority)
        if permit is None:
            logger.debug(
                "%s model=%s waits for a permit: %d in flight, %d waiting before it",
                call.request.operation,
                model,
                state.admission.in_flight,
                state.admission.queued,
            )
            try:
                permit = await state.admission.acquire(model, plain=plain, priority=priority)
            except LLMError as error:
                context = {"operation": call.request.operation, "url": call.url, "model": model}
                raise error.completed(context=context)  # noqa: B904 - it is the same error
        call.admit(permit)

    async def _ask_for_limits(self, state: OpenState, finder: LimitFinder) -> bool:
        """Asks the server for its limits, and puts them in force. If it does not answer, nothing changes.

        Returns:
            Whether the server need not be asked again, unless a connection to it is lost.
        """
        try:
            limits = await finder.find(self)
        except LLMError as error:
            if not state.closed.done():
                level = logging.DEBUG if finder.only_when_needed else logging.WARNING
                logger.log(level, "the server did not report its limits; %s stays in force: %s", self.limits, error)
            # A server that refuses the question will refuse it the next time as well.
            return finder.only_when_needed or (error.status is not None and error.status < 500)
        if limits != self._limits:
            logger.info("using the limits that the server reports: %s", limits)
            self._limits = limits
            state.admission.set_limits(limits)
            state.read_first_events()
        return True

    async def _attempt_until_final(self, state: OpenState, call: Call, receive: _Receive[_T]) -> _T | Reply:
        """Sends the request until an attempt succeeds, or fails in a way that a further attempt cannot overcome.

        An attempt fails either with a reply that reports an error, or because no complete reply arrives.
        """
        while True:
            if state.closed.done():
                raise closed_error(call)
            error: LLMError | None = None
            try:
                answer = await self._attempt(state, call, receive)
            except ConnectionFailed as failure:
                if state.closed.done():
                    error, wait = closed_error(call), None
                else:
                    self._note_failure(state, call, failure)
                    error, wait = self._complete_error(call, failure), self._wait_after_failure(call, failure)
            else:
                if not isinstance(answer, Reply) or answer.status < 400:
                    return answer
                if call.request.failover is not None:
                    call.request.failover.on_error_reply(call, answer)
                wait = self._wait_after_reply(call, answer)
                if wait is None:
                    return answer
            if error is not None and wait is None:
                # Raised outside the `except` clause, so that the failure does not become its `__context__`.
                raise error
            # This is a sleep that ends early if the transport is closed.
            await asyncio.wait((state.closed,), timeout=wait)

    async def _attempt(self, state: OpenState, call: Call, receive: _Receive[_T]) -> _T | Reply:
        """Sends the request once, and reads as much of the response as `receive` does.

        Raises:
            ConnectionFailed: No response arrived, or only a part of it.
            LLMTimeoutError: With phase "first_byte" or "total".
        """
        status: int | None = None
        try:
            with call.begin_attempt():
                response = await self._send(state, call)
                status = response.status
                try:
                    if status >= 400:
                        return await receive_reply(call, response)
                    return await receive(call, response)
                except BaseException:
                    # Part of the response may not have been read, so the connection cannot be used again.
                    response.close()
                    raise
        except TimeoutError as exc:
            raise call.attempt_timed_out(exc).completed(status=status) from exc

    async def _send(self, state: OpenState, call: Call) -> HttpResponse:
        request = call.request
        headers = self._headers if request.body is None else self._json_headers
        # HTTP over a Unix socket needs some host, and servers expect this one.
        url = call.url if self._socket_path is None else f"http://localhost{call.url[len(self.api_base) :]}"
        http_request = HttpRequest(
            method=request.method,
            url=add_query(url, request.query) if request.query else url,
            headers=merge_headers(headers, request.headers) if request.headers else headers,
            body=request.body,
            connect_timeout=request.timeouts.connect,
            fresh_connection=not request.repeatable,
            keeps_compression=request.keeps_compression,
        )
        try:
            return await state.session.send(http_request)
        except StaleConnection:
            if state.closed.done():
                raise
        # A kept connection was dead before any byte of a response had arrived. That is normal: llama.cpp, for example,
        # closes the connection after every stream although it announces keep-alive. So the request is sent once more at
        # once, and this does not count as a retry.
        state.forget_server(was_stale=True)
        return await state.session.send(http_request)

    def _wait_after_reply(self, call: Call, reply: Reply) -> float | None:
        """Returns the seconds to wait before the next attempt, or None if this reply is final."""
        verdict = call.request.classify(reply.status, reply.headers, reply.plain_body)
        if verdict is Verdict.RETRY and not call.request.repeatable and reply.status not in _REFUSED_BEFORE_WORK:
            return None
        try:
            wait = call.wait_before_next(verdict, reply.retry_after)
        except LLMTimeoutError as error:
            body = redacted_beginning(reply.plain_body, partial(self.redact, headers=call.request.headers))
            raise error.completed(status=reply.status, body=body)  # noqa: B904 - it is the same error
        self._record_wait(call, verdict, wait, f"status {reply.status}")
        return wait

    def _note_failure(self, state: OpenState, call: Call, failure: ConnectionFailed) -> None:
        if failure.verdict is Verdict.RETRY:
            state.forget_server()
        if (failover := call.request.failover) is not None:
            failover.on_failure(call, failure, self.redact(failure.error.message, call.request.headers))

    def _wait_after_failure(self, call: Call, failure: ConnectionFailed) -> float | None:
        """Returns the seconds to wait before the next attempt, or None if this failure is final."""
        if failure.verdict is not Verdict.RETRY:
            return None
        if not call.request.repeatable and not failure.unsent:
            failure.error.hint = _NOT_RESENT_HINT
            return None
        wait = call.wait_before_next(failure.verdict, None)
        self._record_wait(call, failure.verdict, wait, failure.error.message)
        return wait

    def _record_wait(self, call: Call, verdict: Verdict, wait: float | None, reason: str) -> None:
        if wait is not None:
            self._retries[call.request.model] += verdict is Verdict.RETRY
            logger.debug("%s: %s; %s in %.2f s", call.request.operation, reason, verdict.value, wait)

    def _complete_error(self, call: Call, failure: ConnectionFailed) -> LLMError:
        """Returns the error of a failure, with its context and without the key."""
        error = failure.error
        # The errors of the HTTP parser quote the response, and the response may quote the key.
        headers = call.request.headers
        if error.__cause__ is not None and self.redact(repr(error.__cause__), headers) != repr(error.__cause__):
            error.__cause__ = None
        return error.completed(self.redact(error.message, headers), context=call.context())

    # The state in an event loop

    def _ensure_open(self) -> OpenState:
        state = self._open_state
        if state is not None:
            state.loop_guard.check()
            if not state.loop.is_closed():
                return state
            _warn_about_closed_loop()
            state.abandon()
        admission = Admission(self._limits, self._swaps, self._evictions)
        search = None if self._limit_finder is None else LimitSearch(self._limit_finder, admission)
        self._open_state = state = OpenState(self.open_session(), admission, search)
        return state


def _finish_with_reply(call: Call, reply: Reply) -> None:
    if reply.status < 400:
        call.note_first_event(reply.body)
    call.read_usage = partial(call.request.read_usage, reply.body)
    call.finish(reply.status)


def _warn_about_closed_loop() -> None:
    warnings.warn(
        "an lmbridge client was still open when its event loop was closed; close the client in the loop that uses it",
        ResourceWarning,
        stacklevel=4,
    )
