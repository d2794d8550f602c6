"""A server that does as it is told, on a real socket of the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Self

from lmbridge.testing import completions
from lmbridge.testing.behaviours import answer, reply
from lmbridge.testing.connection import Bell, Connection
from lmbridge.testing.exchange import Behaviour, Exchange
from lmbridge.testing.wire import BadRequest, Request

_HOST: Final = "127.0.0.1"
GENERATIONS: Final = frozenset(
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "messages", "responses")
)
"""The paths of what a model has to answer."""


class ScriptedServer:
    """An OpenAI-compatible server whose every byte is under control.

    What answers a request, the first that fits: the behaviour for its path (`on_path`), then, if it is not a GET,
    the next one of the script (`script`), the one for its model (`on_model`), or `default`. `GET /v1/models` lists
    `models`; an unknown path is a 404.

    Args:
        models: The models that the server has.
        close_after_stream: Close the connection right after a streamed reply, without having announced it, as
            llama.cpp does; its heads advertise `Keep-Alive: timeout=5, max=100` nevertheless.
        keep_alive: False closes the connection after each reply, without having announced it.
        max_requests_per_connection: Replies after which the connection is closed, without having announced it.

    Attributes:
        models: As given; may be changed at any time.
        default: What answers a request for which there is nothing else.
        hang_up_reused: How many of the next requests on a connection that has served one before are to be closed
            without a byte of reply: a kept connection that turns out dead only when it is used. They are recorded
            as `refused`, and take nothing from the script.
        requests: All requests, in the order in which they arrived.
        aborts: Those whose client left before the reply was whole.
        errors: What behaviours raised. `close` raises it; clear the list if you expected it.
        in_flight: Requests other than GET that are being handled.
        max_in_flight: The most that were at any one time.
    """

    def __init__(
        self,
        models: Iterable[str] = ("test-model",),
        *,
        close_after_stream: bool = False,
        keep_alive: bool = True,
        max_requests_per_connection: int | None = None,
    ) -> None:
        self.models = list(models)
        self.default: Behaviour = answer("Hello from the scripted server.")
        self.hang_up_reused = 0
        self.requests: list[Request] = []
        self.aborts: list[Request] = []
        self.errors: list[BaseException] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self._close_after_stream = close_after_stream
        self._keep_alive = keep_alive
        self._max_requests = max_requests_per_connection
        self._script: deque[Behaviour] = deque()
        self._by_model: dict[str, Behaviour] = {}
        self._by_path: dict[str, Behaviour] = {}
        self._connections: list[Connection] = []
        self._bell = Bell()
        self._listener: asyncio.Server | None = None
        self._port: int | None = None

    async def __aenter__(self) -> Self:
        if self._port is not None:
            raise RuntimeError("a scripted server is opened once; make another one")
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._accept, _HOST, 0, backlog=1024)
        self._port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except BaseExceptionGroup as group:
            if error is None:
                raise
            error.add_note(f"besides, behaviours of the scripted server raised: {group.exceptions!r}")

    async def close(self) -> None:
        """Stop: cancel the behaviours that still run, and close all sockets.

        Raises:
            BaseExceptionGroup: A behaviour raised, and `errors` still has it. Raised by the first call only.
        """
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        await _close_listener(listener)
        for connection in self._connections:
            connection.abandon()
        tasks = [connection.task for connection in self._connections if connection.task is not None]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        self.errors += [result for result in results if isinstance(result, Exception)]
        for connection in self._connections:
            await connection.wait_closed()
        await listener.wait_closed()
        if self.errors:
            raise BaseExceptionGroup("behaviours of the scripted server raised", self.errors)

    @property
    def origin(self) -> str:
        """The server's URL, without a path."""
        if self._port is None:
            raise RuntimeError("the scripted server is not open; use `async with`")
        return f"http://{_HOST}:{self._port}"

    @property
    def api_base(self) -> str:
        """The URL to point a client at: `origin` and `/v1`."""
        return f"{self.origin}/v1"

    @property
    def connections(self) -> int:
        """Connections accepted so far."""
        return len(self._connections)

    @property
    def open_connections(self) -> int:
        """Connections that neither side has closed."""
        return sum(not connection.over for connection in self._connections)

    def script(self, *behaviours: Behaviour) -> None:
        """Append behaviours for the next requests that are not GET, one each."""
        self._script.extend(behaviours)

    def on_model(self, model: str, behaviour: Behaviour) -> None:
        """Answer requests for a model with this behaviour once the script is used up."""
        self._by_model[model] = behaviour

    def on_path(self, path: str, behaviour: Behaviour) -> None:
        """Answer requests for a path, whatever their method, with this behaviour instead of the script's."""
        self._by_path[path] = behaviour

    def drop_connections(self) -> None:
        """Close the connections that were kept after a reply and serve no request now."""
        for connection in self._connections:
            if connection.served and not connection.busy:
                connection.hang_up()

    async def wait_until(self, condition: Callable[[], object], timeout: float = 10) -> None:
        """Wait for something to come true.

        Args:
            condition: Looked at now and after everything that happens on the server.
            timeout: Seconds after which to give up.

        Raises:
            TimeoutError: It did not come true; says what was seen.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._bell.wait_until(condition)
        except TimeoutError as error:
            raise TimeoutError(f"not within {timeout} s; the scripted server saw: {self._seen()}") from error

    def _seen(self) -> str:
        facts = [f"{self.open_connections} of {self.connections} connections open", f"{self.in_flight} in flight"]
        facts.append(f"{len(self._script)} scripted behaviours left")
        facts += [f"raised {error!r}" for error in self.errors]
        return "; ".join([*facts, *map(str, self.requests)])

    def _accept(self) -> Connection:
        connection = Connection(self.connections + 1, self._serve, self._bell.ring)
        self._connections.append(connection)
        return connection

    async def _serve(self, connection: Connection) -> None:
        try:
            while (request := await connection.next_request()) is not None:
                await self._handle(connection, request)
        except BadRequest as error:
            unread = self._exchange(Request(method="", path="", connection=connection.number), connection)
            with contextlib.suppress(ConnectionError):
                await reply(400, completions.error(str(error), "invalid_request_error"))(unread)
        finally:
            connection.hang_up()

    async def _handle(self, connection: Connection, request: Request) -> None:
        self.requests.append(request)
        if connection.served and self.hang_up_reused > 0:
            self.hang_up_reused -= 1
            request.refused = True
            connection.hang_up()
            return
        exchange = self._exchange(request, connection)
        generates = request.method != "GET"
        self.in_flight += generates
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        connection.busy = True
        self._bell.ring()
        try:
            await self._perform(self._choose(request), exchange, connection)
        finally:
            connection.busy = False
            connection.served += 1
            self.in_flight -= generates
            self._settle(exchange, connection)
            self._bell.ring()

    def _exchange(self, request: Request, connection: Connection) -> Exchange:
        model = request.fields.get("model")
        advertise = {}
        if request.asks_to_close:
            advertise = {"Connection": "close"}
        elif self._close_after_stream:
            advertise = {"Keep-Alive": "timeout=5, max=100"}
        return Exchange(
            request,
            connection,
            reply_id=f"chatcmpl-{len(self.requests)}",
            model=model if isinstance(model, str) else next(iter(self.models), ""),
            advertise=advertise,
        )

    def _choose(self, request: Request) -> Behaviour:
        if request.path in self._by_path:
            return self._by_path[request.path]
        if request.method == "GET":
            return self._look_up(request)
        if self._script:
            return self._script.popleft()
        model = request.fields.get("model")
        if isinstance(model, str) and model in self._by_model:
            return self._by_model[model]
        return self.default if request.path in GENERATIONS else self._unknown(request)

    def _look_up(self, request: Request) -> Behaviour:
        if request.path == "/v1/models":
            return reply(200, completions.model_list(self.models))
        return self._unknown(request)

    def _unknown(self, request: Request) -> Behaviour:
        message = f"Invalid URL ({request.method} {request.path})"
        return reply(404, completions.error(message, "invalid_request_error"))

    async def _perform(self, behaviour: Behaviour, exchange: Exchange, connection: Connection) -> None:
        try:
            await behaviour(exchange)
            if not connection.over:
                await exchange.end()
            await connection.flush()
        except asyncio.CancelledError as error:
            if not connection.cancelled:
                await self._fail(error, exchange, connection)  # what the behaviour awaited was cancelled, not it
            elif not connection.left:
                raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - for close() to raise, pytest's own outcomes included
            if not (connection.left and isinstance(error, ConnectionError)):
                await self._fail(error, exchange, connection)

    async def _fail(self, error: BaseException, exchange: Exchange, connection: Connection) -> None:
        """Keep the error, and let the client know as well: its test would wait for a reply otherwise."""
        self.errors.append(error)
        if not (exchange.started or connection.over):
            told = completions.error(f"the behaviour of the scripted server raised {error!r}", "server_error")
            await reply(500, told)(exchange)
        connection.hang_up()

    def _settle(self, exchange: Exchange, connection: Connection) -> None:
        request = exchange.request
        request.finished = exchange.ended and connection.sent
        request.aborted = connection.left and not request.finished
        if request.aborted:
            self.aborts.append(request)
        if self._closes_after(exchange, connection):
            connection.hang_up()

    def _closes_after(self, exchange: Exchange, connection: Connection) -> bool:
        return (
            not self._keep_alive
            or exchange.closes
            or exchange.request.asks_to_close
            or (self._close_after_stream and exchange.streamed)
            or (self._max_requests is not None and connection.served >= self._max_requests)
        )


async def _close_listener(listener: asyncio.Server) -> None:
    """Stop accepting, and only then close: asyncio loses a connection whose accept is half done (gh-109564)."""
    loop = asyncio.get_running_loop()
    for listening in listener.sockets:
        with contextlib.suppress(NotImplementedError):  # the proactor of Windows, which accepts in one go
            loop.remove_reader(listening.fileno())
    await asyncio.sleep(0)  # what was accepted before becomes a `Connection` in this turn
    listener.close()
