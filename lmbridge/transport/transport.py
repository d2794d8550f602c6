"""`Transport`: sends requests to one server, and decides when each is admitted.

`Transport._perform` takes a request through three steps:

1. *Admission*: a generation waits for a permit from the scheduler. Model lists and health checks do not.
2. *Attempts*: the request is sent, and sent again as long as a further attempt may succeed
   (`lmbridge.transport.attempts`).
3. *The reply*: when `request` returns, the reply is complete and the permit has been returned. The `EventStream` that
   `stream` returns holds the permit until it is closed.

These alternatives were considered. Retries in a decorator around all three steps would return the permit between two
attempts, so a server that is loading one model could get a request for another one in the meantime. Retries inside the
HTTP session could not take the total time limit into account. A separate task for each request, which `close` could
cancel, would cost more than all other bookkeeping of a request. Instead, `close` closes the session, which wakes every
task that waits for a response.

The transport does not send anything itself: it uses the interface in `lmbridge.transport.http_interface`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl as ssl_module
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from lmbridge._checks import check_instance, check_integer
from lmbridge._copying import NotCopyable
from lmbridge.config import (
    Limits,
    check_api_key,
    check_auth,
    default_api_base,
    default_api_key,
    normalize_api_base,
    socket_path_of,
    split_credentials,
)
from lmbridge.errors import LLMError
from lmbridge.transport.admission import Admission
from lmbridge.transport.attempts import Attempts, Receive
from lmbridge.transport.calls import MAX_REPLY_BYTES, Call, Reply, Request
from lmbridge.transport.credentials import Credentials
from lmbridge.transport.events import EventStream
from lmbridge.transport.evictions import Evictions
from lmbridge.transport.forwarding import ForwardedResponse, receive_forwarded
from lmbridge.transport.headers import (
    check_headers,
)
from lmbridge.transport.http_interface import HttpSession
from lmbridge.transport.limit_search import LimitFinder, LimitSearch, as_finder
from lmbridge.transport.open_state import OpenState, warn_about_closed_loop
from lmbridge.transport.options import api_roots, choose_auth
from lmbridge.transport.proxies import choose_proxy
from lmbridge.transport.receive import receive_begun_stream, receive_reply, receive_stream
from lmbridge.transport.schedule_view import ScheduledModel, Swap, models_in
from lmbridge.transport.session import AiohttpSession

if TYPE_CHECKING:
    from lmbridge.transport.stats import ClientStats

logger: logging.Logger = logging.getLogger("lmbridge.transport")

_SSL_HINT: Final = "to trust a certificate of your own, pass ssl.create_default_context(cafile='ca.pem')"

_T = TypeVar("_T", bound="Reply | EventStream | ForwardedResponse")
FindLimits = Callable[["Transport"], Awaitable[Limits]]
"""An async function that asks the server of a transport how many requests and models it can handle at the same time."""


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
            connection was refused or lost, because a different server may be running by then. Pass a `LimitFinder` to
            determine when it is called.
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
        """The URL of the server, such as `http://127.0.0.1:1234/v1`."""
        self._socket_path = socket_path_of(self.api_base)
        self._api_root, self._server_root = api_roots(self.api_base)
        auth = choose_auth(check_auth(auth), url_auth, api_key)
        if api_key is None and auth is None:
            api_key = self.default_key()
        self.api_key: Final = check_api_key(api_key)
        """The key that is sent as a bearer token, or None."""
        self._limit_finder = as_finder(limits)
        given: Any = limits if self._limit_finder is None else self._limit_finder.until_known
        self._limits = Limits() if given is None else check_instance("limits", given, Limits)
        self._ssl = check_instance("ssl", ssl, ssl_module.SSLContext, optional=True, hint=_SSL_HINT)
        self._proxy, self._trust_env = choose_proxy(
            proxy, self.api_base, trust_env=trust_env, is_socket=self._socket_path is not None
        )
        check_integer("max_reply_bytes", max_reply_bytes, optional=True)
        self._max_reply_bytes = MAX_REPLY_BYTES if max_reply_bytes is None else max_reply_bytes
        self._credentials = Credentials(self.api_key, auth, self._proxy, check_headers("headers", headers))
        self._open_state: OpenState | None = None
        self._retries: Counter[str | None] = Counter()
        self._swaps: Counter[str | None] = Counter()
        self._evictions = Evictions()
        self._attempts = Attempts(
            self._credentials, self._retries, api_base=self.api_base, socket_path=self._socket_path
        )

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

    def default_key(self) -> str | None:
        """Returns the key that is sent if none was passed: that of the environment. A subclass may override it."""
        return default_api_key()

    def open_session(self) -> HttpSession:
        """Creates the session that sends the requests. It is called when the transport opens, in its event loop.

        Override it to send requests by other means than a socket, as `lmbridge.testing.MockTransport` does.
        """
        return AiohttpSession(
            # The server may have yet to be asked for its limits.
            max_concurrency=None if self._limit_finder is not None else self._limits.max_concurrency,
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
        """Returns the models that have requests, or that are loaded as far as the schedule knows."""
        return [] if self._open_state is None else models_in(self._open_state.admission.scheduler)

    def recent_swaps(self) -> list[Swap]:
        """Returns the latest swaps since the transport was opened, in order."""
        return [] if self._open_state is None else list(self._open_state.admission.scheduler.recent_swaps)

    @property
    def has_credentials(self) -> bool:
        """Whether requests have a header with a key that belongs to the transport."""
        return self._credentials.has_key

    @property
    def limits(self) -> Limits:
        """The limits that are in force.

        If the server has to be asked, they are the defaults, or `LimitFinder.until_known`, until it has answered. If it
        has killed a generation to load another model, `max_loaded_models` is at most the number of models that it held
        at that time.
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
        """The models for which requests may be in flight.

        It is None if the number of models is not limited, or if the transport is not open.
        """
        if self._open_state is None or self.limits.max_loaded_models is None:
            return None
        return self._open_state.admission.scheduler.active_models

    def owns_url(self, url: str) -> bool:
        """Returns whether a request with this URL goes to the server of this transport."""
        return url.startswith(f"{self._server_root}/")

    @property
    def closing(self) -> asyncio.Future[None] | None:
        """A future that is done once the open transport begins to close; None if the transport is not open."""
        return None if self._open_state is None else self._open_state.closing

    def redact(self, text: str, headers: Mapping[str, str] | None = None) -> str:
        """Returns the text with "[api_key]" in place of the key, which some servers quote in their errors.

        Args:
            text: A text for an error or a log line.
            headers: The headers of one request. Their values are replaced by "[header]".
        """
        return self._credentials.redact(text, headers)

    # Requests

    def request(self, request: Request) -> Coroutine[Any, Any, Reply]:
        """Sends a request, and returns the complete reply, whatever its status.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMConnectionError: The server cannot be reached, or the connection broke.
            LLMTimeoutError: A time limit has run out.
            LLMResponseError: The reply has more bytes than `max_reply_bytes`, or is compressed in a way that is not
                supported.
            TaskCancelledError: The transport was closed before the reply was complete.
        """
        # This is not a coroutine function, because each layer of coroutines costs time whenever the request waits.
        return self._perform(self._ensure_open(), request, receive_reply, plain=True)

    def stream(self, request: Request) -> Coroutine[Any, Any, EventStream | Reply]:
        """Sends a request for an event stream, and returns the stream. It holds the permit until it is closed.

        If the response is not an event stream, it is read to its end and returned as a `Reply`. The request cannot be
        used again, because its body is dropped; see `Request`.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMConnectionError: The server cannot be reached, or the connection broke.
            LLMTimeoutError: A time limit has run out.
            LLMResponseError: The response is not an event stream and has more bytes than `max_reply_bytes`, or it is
                compressed in a way that is not supported.
            TaskCancelledError: The transport was closed before the response had begun.
        """
        receive = receive_stream if request.failover is None else receive_begun_stream
        return self._perform(self._ensure_open(), request, receive, plain=False)

    async def forward(self, request: Request) -> ForwardedResponse:
        """Sends a request whose response is passed on unchanged, and returns the response, whatever its status.

        The request waits for a permit and is sent again under the same conditions as any other. The response is
        returned when the first part of its body has arrived, and its body is not decompressed;
        `lmbridge.transport.forwarding` has the details. The response holds the permit until its body has been read to
        the end, or until it is closed. The request cannot be used again, because its fields are changed; see `Request`.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMConnectionError: The server cannot be reached, or the connection broke before the response had begun.
            LLMTimeoutError: A time limit has run out.
            LLMResponseError: The body of an error has more bytes than `max_reply_bytes`.
            TaskCancelledError: The transport was closed before the response had begun.
        """
        request.keeps_compression = True
        answer = await self._perform(self._ensure_open(), request, receive_forwarded, plain=False)
        return ForwardedResponse.from_reply(answer) if isinstance(answer, Reply) else answer

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
            warn_about_closed_loop()
            state.abandon()
        else:
            await state.close()

    # One request

    async def _perform(self, state: OpenState, request: Request, receive: Receive[_T], *, plain: bool) -> _T | Reply:
        url = f"{self._server_root if request.below_root else self._api_root}{request.path}"
        call = Call(request, url, state.admission, state.deadline_timer, self._max_reply_bytes)
        state.requests += 1
        answer: _T | Reply | None = None
        try:
            if request.queued:
                search = state.limit_search
                if search is not None and not search.is_over:
                    await search.wait(partial(self._ask_for_limits, state))
                if not self._admit_now(state, call, plain=plain):
                    await self._admit(state, call, plain=plain)
                if request.failover is not None:
                    request.failover.on_admission(call)
            answer = await self._attempts.run_until_final(state, call, receive)
            if request.failover is not None:
                request.failover.on_answer(call, answer)
        except BaseException as exc:
            # Whatever ends the call, a cancellation included, its permit has to be returned.
            call.finish(type(exc).__name__)
            if isinstance(answer, ForwardedResponse):
                # Another server gets the request, although the body of this response has not ended.
                answer.abort()
            raise
        finally:
            state.requests -= 1
        if isinstance(answer, Reply):
            _finish_with_reply(call, answer)
        else:
            state.adopt(answer)
            answer.owner = self
        return answer

    def _admit_now(self, state: OpenState, call: Call, *, plain: bool) -> bool:
        """Gives a permit to the call if it need not wait. Returns whether it got one."""
        model = call.request.model
        # This makes `stats` list every model that was ever requested.
        self._retries.setdefault(model, 0)
        permit = state.admission.acquire_now(model, plain=plain, priority=call.request.priority)
        if permit is None:
            return False
        call.admit(permit)
        return True

    async def _admit(self, state: OpenState, call: Call, *, plain: bool) -> None:
        """Waits for a permit, and gives it to the call."""
        model, operation, admission = call.request.model, call.request.operation, state.admission
        logger.debug(
            "%s model=%s waits for a permit: %d in flight, %d waiting before it",
            operation,
            model,
            admission.in_flight,
            admission.queued,
        )
        try:
            permit = await admission.acquire(model, plain=plain, priority=call.request.priority)
        except LLMError as error:
            raise error.completed(context={"operation": operation, "url": call.url, "model": model})  # noqa: B904 - it is the same error
        call.admit(permit)

    async def learn_limits(self) -> None:
        """Asks the server for its limits unless it has been asked, or the limits were given as numbers.

        If the server does not answer, the limits stay as they are.

        Raises:
            TaskCancelledError: The transport was closed before the server had answered.
        """
        state = self._ensure_open()
        if state.limit_search is not None:
            await state.limit_search.ask_now(partial(self._ask_for_limits, state))

    async def _ask_for_limits(self, state: OpenState, finder: LimitFinder) -> bool:
        """Asks the server for its limits, and puts them in force. If it does not answer, nothing changes.

        Returns:
            Whether the server need not be asked again, unless a connection to it is lost.
        """
        try:
            limits = await finder.find(self)
        except LLMError as error:
            if not state.closing.done():
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

    # The state in an event loop

    def _ensure_open(self) -> OpenState:
        state = self._open_state
        if state is not None:
            state.loop_guard.check()
            if not state.loop.is_closed():
                return state
            warn_about_closed_loop()
            state.abandon()
        admission = Admission(self._limits, self._swaps, self._evictions)
        search = None if self._limit_finder is None else LimitSearch(self._limit_finder, admission)
        self._open_state = state = OpenState(self.open_session(), admission, search)
        return state


def _finish_with_reply(call: Call, reply: Reply) -> None:
    if reply.status < 400:
        call.note_first_event(reply.body, is_stream=False)
    call.read_usage = partial(call.request.interpreter.read_usage, reply.body)
    call.finish(reply.status)
