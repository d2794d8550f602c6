"""`LLMClient`: the API of a server, as dicts and streams of dicts.

The client has one method for each endpoint. Those that ask a model are in `chat_methods` and `endpoints`. This file has
the options of a client, its servers, what it can find out about them, and how it is closed.
"""

from __future__ import annotations

import ssl as ssl_module
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, Unpack, cast

from lmbridge._checks import check_choice, check_instance, check_integer, check_model_name, hint_for
from lmbridge._pending_call import explains_missing_await
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.auto_limits import resolve_limits
from lmbridge.client.call_options import RequestOptions, take_request_options
from lmbridge.client.chat_methods import ChatMethods
from lmbridge.client.model_lists import model_ids
from lmbridge.client.served_model import MismatchMode, MismatchPolicy
from lmbridge.client.several_servers import answers_of, ask_each, combined_info, connect
from lmbridge.config import (
    UNSET,
    Limits,
    Priority,
    Timeouts,
    Unset,
    as_timeouts,
    check_priority,
    default_model,
    normalize_api_base,
)
from lmbridge.errors import LLMConnectionError, LLMError, LLMTimeoutError, LLMValidationError
from lmbridge.observe.observer import Observer, as_observers
from lmbridge.transport import BaseTransport, Interpreter, Transport, Verdict
from lmbridge.transport.headers import check_headers

if TYPE_CHECKING:
    from lmbridge.client.client_models import Models
    from lmbridge.client.lmstudio import LMStudio
    from lmbridge.client.raw_responses import RawResponses
    from lmbridge.client.server_info import ServerInfo
    from lmbridge.transport.stats import ClientStats

HEALTH_CHECK_SECONDS: Final = 5.0
"""The most seconds that a health check may take."""

_MISPLACED_IN_TRANSPORT: Final = {
    "str": "pass the URL of a server as api_base",
    "LLMClient": "client.with_options() returns a client on the same transport",
    "LLMClientPool": "the clients of a pool share a transport: async with pool.client() as client",
}


class ClientOptions(TypedDict, total=False):
    """The options of a client, as keyword arguments; `LLMClient` documents each of them."""

    api_base: str | Sequence[str] | None
    model: str | None
    api_key: str | None
    base_url: str | Sequence[str] | None
    timeout: Timeouts | float | Unset | None
    max_retries: int
    limits: Limits | Literal["auto"] | None
    model_mismatch: MismatchMode
    context_overflow: Literal["raise", "warn"] | None
    headers: Mapping[str, str] | None
    auth: tuple[str, str] | None
    proxy: str | None
    priority: Priority
    ssl: ssl_module.SSLContext | None
    trust_env: bool
    max_reply_bytes: int | None
    transport: BaseTransport | None
    observers: Sequence[Observer]


class LLMClient(ChatMethods):
    """A client of one server with an OpenAI-compatible `/v1`.

    It opens with its first request. `close`, or leaving its `async with` block, closes its connections; a later request
    opens it again. One client serves any number of concurrent tasks of one event loop::

        async with LLMClient("http://127.0.0.1:1234/v1") as client:
            reply = await client.chat_completion([{"role": "user", "content": "Hello!"}])
            print(reply["choices"][0]["message"]["content"])

    Args:
        api_base: The URL of the server, with or without `/v1`. Default: the environment variable `LMBRIDGE_API_BASE`,
            else `LMSTUDIO_HOST` and `LMSTUDIO_PORT`, else `http://127.0.0.1:1234/v1`, where LM Studio listens.
            A `#` at the end says that nothing is added to the URL, for servers without `/v1`. `unix:///run/llm.sock`
            is a Unix socket. With a list of URLs, each request goes to the server that is best suited for it, and to
            another one if that fails, as docs/several-servers.md describes. All of them get the same key, and each has
            the `limits`.
        model: The model of calls that name none. Default: the environment variable `LMBRIDGE_MODEL`, or
            `DEFAULT_MODEL` if the environment also names the server; else the server chooses.
        api_key: The key that is sent as a bearer token. Default: the environment variable `LM_API_TOKEN`, else none.
        timeout: The timeouts of each request. A number of seconds limits each wait, like
            `Timeouts(connect=min(5, t), first_byte=t, idle=t)`; None switches all limits off. Default: those of
            `Timeouts()`.
        max_retries: How often a request is sent again after a refused connection or a temporary error. Numbers above 5
            count as 5. Default: 2.
        limits: How many requests and models may be active at the same time. "auto" asks the server for its limits
            before the first request, as docs/model-scheduling.md describes. By default a server on this machine or in a
            private network is asked as soon as a second request would be in flight at the same time, and any other
            server has the limits of `Limits()`. Pass `Limits()` so that no server is asked.
        base_url: Another name of `api_base`, which other libraries use.
        headers: Headers of every request, in addition to those of lmbridge or in their place. Errors and logs never
            repeat their values.
        auth: A user and a password for basic authentication, in place of a key. They may also be in the URL.
        proxy: The URL of an HTTP proxy, or of a SOCKS proxy if the package aiohttp-socks is installed. It may contain a
            user and a password. Default: none.
        priority: How urgent the requests are: "interactive", "normal" (the default), "batch", or an integer; the names
            stand for 1, 0 and -1. When requests wait for a permit, those with a higher number go first. A waiting
            request rises by 1 for every `Limits.max_wait` seconds, up to the highest priority among those that wait.
            The priority is not sent to the server.
        model_mismatch: What happens if the model that answers is not the one that was asked for. "warn", the default,
            logs a warning for each pair of names, "raise" raises `ModelMismatchError`, and "ignore" does nothing. If
            another model continues an answer in the middle of a stream, that is an error except with "ignore".
        ssl: The TLS context for https, for example with a certificate authority of your own. Default: aiohttp's default
            context.
        context_overflow: What happens to a chat whose prompt is longer than the model's context: "raise" raises
            `ContextLengthExceededError` before anything is sent, and "warn" logs a warning. Ollama would cut such a
            prompt without reporting it. A cut is also noticed after the reply, or at the end of a stream that reports
            the usage. The server is asked for the context length at most once a minute, and for an exact count of a
            prompt that may be too long. Default: None, no check.
        trust_env: Whether the proxies and the netrc file of the environment are used. A server on the loopback
            interface is never reached through a proxy. Default: False.
        max_reply_bytes: The most bytes that a whole reply or the body of an error may have, after decompression; a
            larger one is an `LLMResponseError`. Streams are not limited, but no event of a stream may exceed 100 MiB.
            Default: 256 MiB.
        transport: A `Transport`, or a `NodePool` of several, whose connections and limits are shared with other
            clients. It cannot be combined with `api_base`, `api_key`, `limits`, `headers`, `auth`, `proxy`, `ssl`,
            `trust_env` and `max_reply_bytes`, and it remains open when the client is closed. Default: the client makes
            a transport for itself.
        observers: Objects that are notified of what happens to each request, such as
            `lmbridge.observe.TimelineObserver`. Default: none.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    _instead_of_a_copy = "use client.with_options() for a variant, and create a separate client in each process"

    def __init__(
        self,
        api_base: str | Sequence[str] | None = None,
        model: str | None = None,
        api_key: str | None = None,
        *,
        base_url: str | Sequence[str] | None = None,
        timeout: Timeouts | float | Unset | None = UNSET,
        max_retries: int = 2,
        limits: Limits | Literal["auto"] | None = None,
        model_mismatch: MismatchMode = "warn",
        context_overflow: Literal["raise", "warn"] | None = None,
        headers: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        proxy: str | None = None,
        priority: Priority = "normal",
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        max_reply_bytes: int | None = None,
        transport: BaseTransport | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        model = check_model_name(default_model() if model is None else model)
        timeouts = Timeouts() if isinstance(timeout, Unset) else as_timeouts(timeout)
        check_integer("max_retries", max_retries, minimum=0)
        mismatch_policy = MismatchPolicy(model_mismatch)
        if base_url is not None and api_base is not None:
            raise LLMValidationError("api_base and base_url are two names of one option", hint="give only one of them")
        api_base = base_url if api_base is None else api_base
        options = {
            "api_key": api_key,
            "limits": limits if transport is not None else resolve_limits(limits),
            "headers": headers,
            "auth": auth,
            "proxy": proxy,
            "ssl": ssl,
            "trust_env": trust_env,
            "max_reply_bytes": max_reply_bytes,
        }
        make_transport: Callable[[str | Sequence[str]], BaseTransport] | None = None
        if transport is not None:
            _check_transport(transport)
            _refuse_beside_transport(api_base=api_base, **options)
        else:
            transport = connect(api_base, **options)
            # The key is kept, because the environment may have changed by the time `api_base` is set.
            options["api_key"] = transport.nodes[0].api_key
            make_transport = partial(connect, **cast("Any", options))
        server = ServerApi(
            transport,
            make_transport=make_transport,
            timeouts=timeouts,
            max_retries=max_retries,
            mismatch_policy=mismatch_policy,
            priority=check_priority(priority),
            context_overflow=_check_context_overflow(context_overflow),
            observers=as_observers(observers),
        )
        self._attach(server, model)

    def _attach(self, server: ServerApi, model: str | None) -> None:
        self._server = server
        self._model = model
        self._lmstudio: LMStudio | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.api_base} model={self._model!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def model(self) -> str | None:
        """The model of calls that name none, or None if the server chooses."""
        return self._model

    @property
    def api_base(self) -> str:
        """The server's URL, with `/v1`. The URLs of several servers are separated by commas.

        It can be set, to a URL or to a list of URLs. Later requests then go to the new server, and streams in progress
        finish on the old one. Setting it raises `LLMValidationError` if the URL is not valid, or if the client was
        created with `transport=`.
        """
        return self._server.transport.api_base

    @api_base.setter
    def api_base(self, api_base: str | Sequence[str]) -> None:
        self._server.set_api_base(api_base)

    @property
    def servers(self) -> tuple[str, ...]:
        """The URL of each server, with `/v1`. There is one unless `api_base` is a list."""
        return tuple(node.api_base for node in self._server.transport.nodes)

    def at_server(self, api_base: str) -> LLMClient:
        """Returns a client for one of several servers, with the options, connections and limits of this one.

        Use it for what concerns a single server, such as loading a model, or checking whether the server is running::

            for url in client.servers:
                print(url, await client.at_server(url).health_check())

        Closing the new client has no effect; close this one instead.

        Args:
            api_base: The URL of a server that this client has.

        Raises:
            LLMValidationError: This client does not have such a server.
        """
        url = normalize_api_base(api_base)
        for node in self._server.transport.nodes:
            if node.api_base == url:
                client = LLMClient.__new__(LLMClient)
                client._attach(self._server.at(node), self._model)  # noqa: SLF001 - same class
                return client
        raise LLMValidationError(f"{url} is not a server of this client", hint=f"it has {', '.join(self.servers)}")

    @property
    def lmstudio(self) -> LMStudio:
        """LM Studio's own API: lists, loads, unloads and downloads models.

        With another server, its methods raise `LLMResponseError`. With several servers, this property raises
        `LLMValidationError`: use `client.at_server(url).lmstudio`.
        """
        if len(self._server.transport.nodes) > 1:
            raise LLMValidationError(
                f"this client has {len(self.servers)} servers, and LM Studio's own API concerns one of them",
                hint="use client.at_server(url).lmstudio",
            )
        if self._lmstudio is None:
            from lmbridge.client.lmstudio import LMStudio

            self._lmstudio = LMStudio(self._server)
        return self._lmstudio

    @property
    def models(self) -> Models:
        """The models of the server. On LM Studio, llama.cpp's router and Ollama, they can be loaded and unloaded.

        With several servers, this property raises `LLMValidationError`: use `client.at_server(url).models`.
        """
        if len(self._server.transport.nodes) > 1:
            raise LLMValidationError(
                f"this client has {len(self.servers)} servers, and each of them has its own models",
                hint="use client.at_server(url).models, or client.list_models() for the names of all",
            )
        from lmbridge.client.client_models import Models

        return Models(self._server)

    @property
    def with_raw_response(self) -> RawResponses:
        """Variants of this client's methods that return each reply with the status and headers of its response."""
        from lmbridge.client.raw_responses import RawResponses

        return RawResponses(self)

    def with_options(
        self,
        *,
        model: str | Unset | None = UNSET,
        timeout: Timeouts | float | Unset | None = UNSET,
        max_retries: int | Unset = UNSET,
        model_mismatch: MismatchMode | Unset = UNSET,
        context_overflow: Literal["raise", "warn"] | Unset | None = UNSET,
        extra_headers: Mapping[str, str] | Unset | None = UNSET,
        priority: Priority | Unset = UNSET,
    ) -> LLMClient:
        """Returns a client with other options on the same transport: it shares connections, limits and statistics.

        For example::

            patient = client.with_options(timeout=600, max_retries=5)

        If the `api_base` of this client is set, the new client uses it as well. If this client is given back to its
        pool, the new one refuses further requests, too. Closing the new client has no effect; close this one instead.

        Args:
            model: The model of calls that name none; None leaves the choice to the server. Default: this client's.
            timeout: The timeouts, a number of seconds for each wait, or None for no limits. Default: this client's.
            max_retries: How often a request is sent again. Default: this client's.
            model_mismatch: What happens if another model answers: "warn", "raise" or "ignore". Default: this client's.
            context_overflow: What happens to a prompt that is too long: "raise", "warn", or None for no check.
                Default: this client's.
            extra_headers: Headers of every request, in addition to this client's or in their place. Default: none.
            priority: How urgent the requests are: "interactive", "normal", "batch", or an integer. Default: this
                client's.

        Raises:
            LLMValidationError: An option is not valid.
        """
        server = self._server.shared(
            timeouts=None if isinstance(timeout, Unset) else as_timeouts(timeout),
            max_retries=None
            if isinstance(max_retries, Unset)
            else check_integer("max_retries", max_retries, minimum=0),
            mismatch_policy=None if isinstance(model_mismatch, Unset) else MismatchPolicy(model_mismatch),
            headers=None if isinstance(extra_headers, Unset) else check_headers("extra_headers", extra_headers),
            priority=None if isinstance(priority, Unset) else check_priority(priority),
            context_overflow=context_overflow
            if isinstance(context_overflow, Unset)
            else _check_context_overflow(context_overflow),
        )
        # The constructor would make a transport, and would read the environment.
        client = LLMClient.__new__(LLMClient)
        client._attach(server, self._model if isinstance(model, Unset) else check_model_name(model))  # noqa: SLF001 - same class
        return client

    @explains_missing_await
    async def list_models(self, **options: Unpack[RequestOptions]) -> list[str]:
        """Returns the ids of the server's models (`GET /v1/models`). The request does not queue behind generations.

        With several servers, each is asked at the same time, and the models of those that answer are merged.

        Args:
            **options: `timeout`, `max_retries`, `extra_headers` and `extra_query` of this call. Without a `timeout`, an
                attempt may take 10 s.

        Raises:
            LLMError: The same errors as `chat_completion`.
        """
        server = self._server_for("list_models", options)
        return await model_ids(server)

    def _server_for(self, method: str, options: Any, *, retries: bool = True) -> ServerApi:
        settings = take_request_options(options, method, retries=retries)
        return self._server if settings is None else self._server.for_call(settings)

    @explains_missing_await
    async def server_info(self, **options: Unpack[RequestOptions]) -> ServerInfo:
        """Finds out which kind of server answers, which models it has loaded, and their context lengths and slots.

        Nothing is cached. The first request is `GET /v1/models`. The others depend on the kind of server that its reply
        suggests: LM Studio `/api/v1/models` (before 0.4.0 also `/api/v0/models`), llama.cpp `/props` (a router once
        more for each loaded model), Ollama `/api/version`, `/api/ps` and `/api/tags` (also `/api/show` if the client's
        own model is not loaded), vLLM `/version`. Each may take 10 s, and none queues behind generations.

        With several servers, the result has the models of all that answer. Of numbers that differ, it has the
        smallest; if the kinds differ, `kind` is "unknown". `server_infos` returns the result of each server.

        Args:
            **options: `timeout`, `max_retries`, `extra_headers` and `extra_query` of each of the requests.

        Returns:
            The server and its models. What the server does not report is None.

        Raises:
            LLMAuthenticationError: The server refused the key.
            LLMError: The same errors as `chat_completion`.
        """
        from lmbridge.client.server_info import describe

        server = self._server_for("server_info", options)
        return combined_info(await answers_of(server, lambda each: describe(each, self._model)))

    @explains_missing_await
    async def server_infos(self, **options: Unpack[RequestOptions]) -> dict[str, ServerInfo | LLMError]:
        """Asks each server what `server_info` asks, all at the same time.

        Args:
            **options: The options of `server_info`.

        Returns:
            What each server reports, by its URL with `/v1`; or the error, for a server that does not answer.

        Raises:
            LLMError: The client was given back to its pool.
        """
        from lmbridge.client.server_info import describe

        server = self._server_for("server_infos", options)
        server.check_not_refused("server info")
        return await ask_each(server, lambda each: describe(each, self._model))

    def stats(self) -> ClientStats:
        """Returns the numbers of requests in flight and queued, of swaps and of retries, in total and by model.

        The numbers are those of the client's transport, so they include other clients that share it. Setting `api_base`
        resets them.
        """
        return self._server.transport.stats()

    @explains_missing_await
    async def health_check(self, **options: Unpack[RequestOptions]) -> bool:
        """Asks whether the server is running and ready. The request is not queued or repeated, and takes at most 5 s.

        With several servers, each is asked, and one that is ready is enough.

        Args:
            **options: `timeout` (in place of the 5 s), `extra_headers` and `extra_query` of this call.

        Returns:
            True if the server is ready; False if nothing answers, or the server is still loading or failing (5xx).

        Raises:
            LLMAuthenticationError: The server is running, but refuses the key.
            LLMResponseError: Something that is not a model server answers at this address.
            LLMError: The client was given back to its pool.
        """
        return any(await answers_of(self._server_for("health_check", options, retries=False), _is_ready))

    async def close(self) -> None:
        """Ends requests and streams in progress with `TaskCancelledError`, and closes all connections.

        It can be called more than once. A later request opens the client again. A transport that was passed to the
        constructor stays open.
        """
        await self._server.close()


async def _is_ready(server: ServerApi) -> bool:
    request = server.build_get(
        "health check",
        "/models",
        max_seconds=HEALTH_CHECK_SECONDS,
        max_retries=0,
        interpreter=Interpreter(classify=_never_retry),
    )
    try:
        reply = await server.request(request)
    except (LLMConnectionError, LLMTimeoutError):
        return False
    if reply.status >= 500:
        return False
    server.json_object(reply)
    return True


def _check_context_overflow(value: Literal["raise", "warn"] | None) -> Literal["raise", "warn"] | None:
    return None if value is None else check_choice("context_overflow", value, ("raise", "warn"))


def _check_transport(transport: object) -> None:
    if not callable(getattr(transport, "stream", None)) or not hasattr(transport, "nodes"):
        check_instance("transport", transport, Transport, hint=hint_for(transport, _MISPLACED_IN_TRANSPORT))


def _refuse_beside_transport(**options: Any) -> None:
    """Checks that no option of the transport is combined with `transport`.

    Raises:
        LLMValidationError: One or more are set.
    """
    # Compared by identity, because 0 equals False.
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise LLMValidationError(
            f"{' and '.join(given)} cannot be combined with transport=", hint="pass them to the Transport instead"
        )


def _never_retry(_status: int, _headers: Mapping[str, str], _body: bytes) -> Verdict:
    return Verdict.FAIL
