"""`Gateway`: an HTTP server between the programs on a machine and their model servers, which schedules all requests.

Programs that share a model server do not know each other's requests, so none of them can keep the model of another
one loaded. The gateway knows them all: it admits each request by its model, as a client does, and passes it on byte for
byte. Nothing is translated, so every endpoint, field and event of the server works through it.

The paths of the gateway itself, such as `/health`, are in this module.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from lmbridge._checks import check_integer, check_seconds, check_text, wrong_type
from lmbridge._copying import NotCopyable
from lmbridge._http_access import bracketed, is_host_name
from lmbridge.client.auto_limits import resolve_limits
from lmbridge.config import Limits, Timeouts, as_timeouts, check_api_key, default_api_base, is_loopback
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.gateway.access import Access
from lmbridge.gateway.activity import Activity
from lmbridge.gateway.gateway_errors import RETRY_AFTER, Problem, problem_of
from lmbridge.gateway.generations import COUNTS, ENDPOINTS, ForwardingOptions, Generations
from lmbridge.gateway.http_server import HttpServer, IncomingRequest, RequestHandler, origin_of
from lmbridge.gateway.metrics import load_prometheus, metrics_page
from lmbridge.gateway.model_catalog import MODELS_PATH, ModelCatalog
from lmbridge.gateway.status import status_of
from lmbridge.gateway.status_page import StatusPage, load_status_page
from lmbridge.gateway.waiting_comments import FIRST_COMMENT_SECONDS
from lmbridge.transport import Transport
from lmbridge.transport.base_transport import BaseTransport
from lmbridge.transport.node_pool import NodePool

if TYPE_CHECKING:
    from lmbridge.transport.stats import ClientStats

logger: logging.Logger = logging.getLogger("lmbridge.gateway")

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""The default of the option `max_body_bytes`."""
CLIENT_SECONDS: Final = 60.0
"""The default of the option `client_timeout`."""
_HIGHEST_PORT: Final = 65535
_UNKNOWN_HINT: Final = (
    "the gateway passes on POST /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses, /v1/messages,"
    " /v1/decisions, /v1/systemone and counts of tokens, and answers GET /v1/models, /health, /metrics, /status and"
    " /status.json; send other requests to the server itself"
)


class Gateway(NotCopyable):
    """An HTTP server on which any program can use model servers under one schedule.

    ::

        async with Gateway("http://127.0.0.1:1234/v1", port=8080) as gateway:
            print(gateway.api_base)     # http://127.0.0.1:8080/v1
            await asyncio.Event().wait()

    docs/gateway.md describes what a gateway does with a request. `python -m lmbridge.gateway` starts one in a terminal.

    A gateway can be opened only once. It is closed by leaving its `async with` block, which breaks off the requests in
    flight; call `drain` before that to let them finish.

    Args:
        upstreams: The URL of the server, or a list of URLs; each request then goes to the server that suits it best.
            You can also pass a `Transport` or a `NodePool`: it is used unchanged, with its own limits and key (so
            `limits` and `upstream_api_key` have no effect), and stays open when the gateway closes. By default the URL
            comes from the environment, like that of an `LLMClient`.
        host: The address to listen on. By default only programs on the same machine can connect. Any other address
            needs an `api_key`.
        port: The port to listen on. With 0, the default, the system chooses one.
        limits: How many requests may be in flight at each server, and for how many models. With "auto", the default,
            each server is asked for its limits when its first request arrives. With None, a server is asked only when
            it would get a second request at the same time, and only if it is on this machine or in a private network.
        api_key: The key that clients have to send, as a bearer token or in the header `X-Api-Key`. It is never passed
            on. By default clients need no key. The keys that they send anyway are then passed on, unless the gateway
            itself has a key for one of the servers.
        upstream_api_key: The key that is sent to the servers. By default it is the environment variable `LM_API_TOKEN`.
        timeout: The time limits of each request to a server, as `Timeouts` or as a number of seconds. The default is
            `Timeouts()`.
        max_retries: How often a request may be sent again, as long as no part of its response has been passed on. The
            default is 2.
        allowed_hosts: Names by which the gateway may be addressed, in addition to its own address and the names of the
            loopback interface. Add the name of the machine if clients use it.
        max_body_bytes: The maximum size of the body of a request, in bytes. The default is 64 MiB.
        client_timeout: How many seconds a client may pause while it sends its request or reads its response, and how
            long an idle connection is kept open. The default is 60.

    Raises:
        LLMValidationError: An argument cannot be used.
    """

    _instead_of_a_copy = "create one in each process"

    def __init__(
        self,
        upstreams: str | Sequence[str] | Transport | NodePool | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | Literal["auto"] | None = "auto",
        api_key: str | None = None,
        upstream_api_key: str | None = None,
        timeout: Timeouts | float | None = None,
        max_retries: int = 2,
        allowed_hosts: Iterable[str] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
        client_timeout: float = CLIENT_SECONDS,
    ) -> None:
        check_text("host", host)
        check_integer("port", port, minimum=0, maximum=_HIGHEST_PORT)
        check_integer("max_retries", max_retries, minimum=0)
        check_integer("max_body_bytes", max_body_bytes)
        check_seconds("client_timeout", client_timeout, optional=False)
        api_key = check_api_key(api_key)
        if api_key is None and not is_loopback(f"http://{bracketed(host)}"):
            raise LLMValidationError(
                f"listening on {host} would let everybody on the network use the gateway",
                hint="pass api_key=, which clients then have to send, or listen on 127.0.0.1",
            )
        self._host, self._port = host, port
        self._is_own = not isinstance(upstreams, Transport | NodePool)
        self._upstream = _make_upstream(upstreams, limits, upstream_api_key)
        self._servers = self._upstream.nodes
        self._server_url: str | None = None
        self._is_draining = False
        self._activity = Activity()
        self._access = Access(host, api_key, _names(allowed_hosts))
        options = ForwardingOptions(
            timeouts=Timeouts() if timeout is None else as_timeouts(timeout),
            max_retries=max_retries,
            max_body_bytes=max_body_bytes,
            comment_seconds=FIRST_COMMENT_SECONDS,
            passes_credentials=api_key is None and not any(each.has_credentials for each in self._servers),
        )
        self._catalog = ModelCatalog(self._servers, passes_credentials=options.passes_credentials)
        self._generations = Generations(self._upstream, self._activity, self._access, options)
        self._client_timeout = client_timeout
        self._http: HttpServer | None = None
        self._page = StatusPage(b"", {})
        self._prometheus: Any = None
        self._idle = asyncio.Event()
        # The number of accepted generations that have not ended, including those whose body is still arriving.
        self._accepted = 0
        self._open_pages: dict[str, RequestHandler] = {"/health": self._answer_health, "/status": self._answer_page}
        self._pages: dict[str, RequestHandler] = {
            MODELS_PATH: self._catalog.answer_list,
            "/status.json": self._answer_status,
            "/metrics": self._answer_metrics,
        }

    def __repr__(self) -> str:
        urls = ", ".join(each.api_base for each in self._servers)
        return f"<{type(self).__name__} {self._server_url or 'not open'} for {urls}>"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def api_base(self) -> str:
        """The URL for clients, such as `http://127.0.0.1:8080/v1`.

        Raises:
            LLMError: The gateway is not open.
        """
        return f"{self.origin}/v1"

    @property
    def origin(self) -> str:
        """The URL of the gateway without a path. The status page is at `/status` below it.

        Raises:
            LLMError: The gateway is not open.
        """
        if self._server_url is None:
            raise LLMError("the gateway is not open", hint="enter it with `async with`")
        return self._server_url

    def stats(self) -> ClientStats:
        """Returns how many requests are in flight and queued now, and how many swaps and retries there were so far."""
        return self._upstream.stats()

    # Opening and closing

    async def open(self) -> None:
        """Begins to accept connections. `async with` calls this method.

        On cancellation of the caller, nothing is left open.

        Raises:
            LLMError: The gateway cannot listen on its address, or has been opened before.
        """
        if self._http is not None:
            raise LLMError("a gateway can be opened only once", hint="create another one")
        self._http = http = HttpServer(self._answer, client_seconds=self._client_timeout)
        try:
            self._page, self._prometheus = await asyncio.to_thread(_load_page_and_prometheus)
            port = await http.listen(self._host, self._port)
        except OSError as exc:
            message = f"the gateway cannot listen on {self._host}:{self._port}: {exc.strerror or exc}"
            raise LLMError(message, exc, hint="choose another port or host") from exc
        self._server_url = origin_of(self._host, port)
        logger.info("the gateway listens on %s", self._server_url)

    async def drain(self) -> None:
        """Refuses new generations, and waits until those that arrived earlier have ended.

        Other requests, such as those for the status page, are still answered.
        """
        self._is_draining = True
        while self._accepted:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """Ends all requests, and closes all connections. Calling it again does nothing.

        On cancellation of the caller, the remaining steps are still taken.
        """
        self._is_draining = True
        http, self._server_url = self._http, None
        try:
            await self._catalog.close()
        finally:
            try:
                if self._is_own:
                    await self._upstream.close()
            finally:
                try:
                    if http is not None:
                        await http.close()
                finally:
                    # A request that was accepted during the steps above may have opened upstream connections again.
                    if self._is_own:
                        await self._upstream.close()

    # Requests

    async def _answer(self, incoming: IncomingRequest) -> None:
        try:
            self._access.check_source(incoming.method, incoming.headers)
            await self._route(incoming)(incoming)
        except Problem as problem:
            await _respond_problem(incoming, problem)
        except LLMError as error:
            await _respond_problem(incoming, problem_of(error))
        except ConnectionError:
            # The client has left.
            raise
        except Exception:
            # This is a bug of the gateway. The log gets the traceback, and the client gets an error like any other.
            logger.exception("the gateway failed to answer %s %s", incoming.method, incoming.path)
            await _respond_problem(
                incoming, Problem(500, "the gateway failed to answer; its log says why", code="internal_error")
            )

    def _route(self, incoming: IncomingRequest) -> RequestHandler:
        """Returns the method that answers a request.

        Raises:
            Problem: The gateway does not have the path or the method, it is draining, or the client lacks the key.
        """
        method, path = incoming.method, incoming.path
        # These pages need no key. The status page contains no data; its script asks the user for the key to the data.
        if method == "GET" and path in self._open_pages:
            return self._open_pages[path]
        self._access.check_key(incoming.headers)
        if path in ENDPOINTS or path in COUNTS:
            if method != "POST":
                raise Problem(405, f"{path} accepts only POST", code="method_not_allowed")
            if self._is_draining:
                raise Problem(503, "the gateway is about to stop", code="draining", retry_after=RETRY_AFTER)
            return self._answer_generation
        if method == "GET" and path in self._pages:
            return self._pages[path]
        if method == "GET" and path.startswith(f"{MODELS_PATH}/"):
            return self._catalog.answer_entry
        raise Problem(404, f"the gateway does not offer {method} {path[:200]}", code="unknown_url", hint=_UNKNOWN_HINT)

    async def _answer_generation(self, incoming: IncomingRequest) -> None:
        self._accepted += 1
        try:
            await self._generations.answer(incoming)
        finally:
            self._accepted -= 1
            if not self._accepted:
                self._idle.set()

    async def _answer_health(self, incoming: IncomingRequest) -> None:
        status = 503 if self._is_draining else 200
        await incoming.respond_json({"status": "draining" if self._is_draining else "ok"}, status)

    async def _answer_page(self, incoming: IncomingRequest) -> None:
        await incoming.respond(200, self._page.headers.items(), self._page.body)

    async def _answer_status(self, incoming: IncomingRequest) -> None:
        self._catalog.refresh()
        status = status_of(self._activity, self._upstream, self._catalog, draining=self._is_draining)
        await incoming.respond_json(status)

    async def _answer_metrics(self, incoming: IncomingRequest) -> None:
        kind, page = metrics_page(self._prometheus, self._activity, self._servers)
        await incoming.respond(200, {"Content-Type": kind, "Cache-Control": "no-store"}.items(), page)


async def _respond_problem(incoming: IncomingRequest, problem: Problem) -> None:
    if incoming.has_begun:
        # It is too late for another response, and the client must not mistake what it has for the whole response.
        incoming.abort()
    else:
        await incoming.respond(problem.status, problem.headers.items(), problem.body(incoming.path))


def _load_page_and_prometheus() -> tuple[StatusPage, Any]:
    return load_status_page(), load_prometheus()


def _names(allowed_hosts: Iterable[str]) -> tuple[str, ...]:
    if isinstance(allowed_hosts, str):
        raise wrong_type("allowed_hosts", "a list of names", allowed_hosts, "for example allowed_hosts=['my-pc.lan']")
    names = tuple(check_text("allowed_hosts", name) for name in allowed_hosts)
    for name in names:
        if not is_host_name(name):
            hint = "pass names such as 'my-pc.lan', without a scheme, a port or a wildcard"
            raise LLMValidationError(f"allowed_hosts contains {name!r}, which is not the name of a host", hint=hint)
    return names


def _make_upstream(
    upstreams: str | Sequence[str] | Transport | NodePool | None,
    limits: Limits | Literal["auto"] | None,
    api_key: str | None,
) -> BaseTransport:
    """Returns the server, or the pool of servers, that requests are passed on to.

    Raises:
        LLMValidationError: `upstreams` is an empty list, or of a type that does not name servers.
    """
    if isinstance(upstreams, Transport | NodePool):
        return upstreams
    hint = "pass the URL of a server, or several of them in a list"
    given = default_api_base() if upstreams is None else upstreams
    urls = [given] if isinstance(given, str) else given
    if not isinstance(urls, Sequence) or not all(isinstance(each, str) for each in urls):
        raise wrong_type("upstreams", "the URL of a server or a list of them", upstreams, hint)
    if not urls:
        raise LLMValidationError("upstreams is empty", hint=hint)
    resolved = resolve_limits(limits)
    transports = [Transport(each, api_key=api_key, limits=resolved) for each in urls]
    return transports[0] if len(transports) == 1 else NodePool(transports)
