"""`ScriptedServer`: an OpenAI-compatible server on a real socket that replies as a test scripts it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Self

from lmbridge.config import QUESTION_HEADER
from lmbridge.testing import completions
from lmbridge.testing.behaviours import answer, reply
from lmbridge.testing.connection import ChangeNotifier, Connection
from lmbridge.testing.exchange import Behaviour, Exchange
from lmbridge.testing.wire import BadRequest, RecordedRequest

_HOST: Final = "127.0.0.1"
GENERATIONS: Final = frozenset(
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "messages", "responses")
)
"""The paths for which a model has to generate something."""
TOKEN_COUNTS: Final = frozenset(("/v1/chat/completions/input_tokens", "/tokenize"))
"""The paths that llama.cpp and vLLM have for counting tokens. An agent may ask for them between two generations."""
running_origins: Final[set[str]] = set()
"""The origins of the servers that are running in this process, which `forbid_real_requests` allows."""


class ScriptedServer:
    """An OpenAI-compatible server on the loopback interface that lets a test control every byte.

    The first of these behaviours that exists answers a request:

    1. the behaviour for its path (`on_path`), whatever its method;
    2. for a GET, the list of `models` if the path is `/v1/models`, and otherwise status 404; for a request that counts
       tokens, status 404;
    3. the next behaviour of the script (`script`);
    4. the behaviour for its model (`on_model`);
    5. `default`, or status 404 if OpenAI's API does not have the path.

    ::

        async with ScriptedServer() as server:
            server.script(reply(503, {"error": "busy"}), answer("Hello"))
            client = LLMClient(server.api_base)

    Args:
        models: The names of the models that the server has.
        close_after_stream: Whether the connection is closed after each streamed reply, although the reply announces
            `Keep-Alive: timeout=5, max=100`. llama.cpp does this.
        keep_alive: Set it to False to close the connection after each reply, although the reply does not announce that.
        max_requests_per_connection: The number of replies after which a connection is closed, although the last reply
            does not announce that. Default: no limit.

    Attributes:
        models: The names of the models. The list may be changed at any time.
        default: The behaviour that answers all other requests.
        hang_up_reused: Set it to N to make the next N requests on reused connections fail: the server closes the
            connection instead of replying, as if the connection had been dead. These requests are recorded as
            `refused`, and take no behaviour from the script.
        requests: All requests in the order in which they arrived. Two kinds of requests are left out, unless a
            behaviour is set for their path: those by which a client without `limits` finds out what the server can do,
            and those that count tokens.
        aborts: The requests whose client disconnected before the reply was complete.
        errors: The exceptions that behaviours have raised. `close` raises them, so clear the list if you expected them.
        in_flight: The number of requests that are being answered, not counting GETs.
        max_in_flight: The highest value that `in_flight` has had.
    """

    def __init__(
        self,
        models: Iterable[str] = ("test-model",),
        *,
        close_after_stream: bool = False,
        keep_alive: bool = True,
        max_requests_per_connection: int | None = None,
    ) -> None:
        self.models: list[str] = list(models)
        self.default: Behaviour = answer("Hello from the scripted server.")
        self.hang_up_reused: int = 0
        self.requests: list[RecordedRequest] = []
        self.aborts: list[RecordedRequest] = []
        self.errors: list[BaseException] = []
        self.in_flight: int = 0
        self.max_in_flight: int = 0
        self._close_after_stream = close_after_stream
        self._keep_alive = keep_alive
        self._max_requests = max_requests_per_connection
        self._script: deque[Behaviour] = deque()
        self._by_model: dict[str, Behaviour] = {}
        self._by_path: dict[str, Behaviour] = {}
        self._connections: list[Connection] = []
        self._changes = ChangeNotifier()
        self._listener: asyncio.Server | None = None
        self._port: int | None = None

    async def __aenter__(self) -> Self:
        if self._port is not None:
            raise RuntimeError("a ScriptedServer can be opened only once; create another one")
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._accept, _HOST, 0, backlog=1024)
        self._port = self._listener.sockets[0].getsockname()[1]
        running_origins.add(self.origin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except BaseExceptionGroup as group:
            if error is None:
                raise
            error.add_note(f"in addition, behaviours of the scripted server raised: {group.exceptions!r}")

    async def close(self) -> None:
        """Stops the server: cancels the behaviours that are still running, and closes all sockets.

        Raises:
            BaseExceptionGroup: Behaviours have raised exceptions, and `errors` still contains them. Only the first call
                raises it.
        """
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        running_origins.discard(self.origin)
        await close_listener(listener)
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
        """The URL of the server without a path, such as `http://127.0.0.1:35981`."""
        if self._port is None:
            raise RuntimeError("the ScriptedServer is not open; enter it with `async with`")
        return f"http://{_HOST}:{self._port}"

    @property
    def api_base(self) -> str:
        """The base URL for a client: `origin` and `/v1`."""
        return f"{self.origin}/v1"

    @property
    def connections(self) -> int:
        """The number of connections that were accepted so far."""
        return len(self._connections)

    @property
    def open_connections(self) -> int:
        """The number of connections that neither side has closed."""
        return sum(not connection.is_disconnected for connection in self._connections)

    def script(self, *behaviours: Behaviour) -> None:
        """Appends behaviours, one for each of the next requests.

        GETs, requests that count tokens, and requests for a path of `on_path` take no behaviour from the script.
        """
        self._script.extend(behaviours)

    def on_model(self, model: str, behaviour: Behaviour) -> None:
        """Sets the behaviour that answers requests for a model when the script is used up."""
        self._by_model[model] = behaviour

    def on_path(self, path: str, behaviour: Behaviour) -> None:
        """Sets the behaviour that answers all requests for a path, whatever their method, in place of the script."""
        self._by_path[path] = behaviour

    def drop_connections(self) -> None:
        """Closes the connections that were kept open after a reply and are idle now."""
        for connection in self._connections:
            if connection.request_count and not connection.busy:
                connection.hang_up()

    async def wait_until(self, condition: Callable[[], object], timeout: float = 10) -> None:
        """Waits until a condition holds.

        Args:
            condition: A function that is called now, and again after everything that happens on the server.
            timeout: How many seconds to wait at most.

        Raises:
            TimeoutError: The condition did not hold in time. The message lists what has happened on the server.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._changes.wait_until(condition)
        except TimeoutError as error:
            raise TimeoutError(f"the condition did not hold within {timeout} s; {self._describe_activity()}") from error

    def _describe_activity(self) -> str:
        facts = [
            f"the scripted server has {self.open_connections} of {self.connections} connections open",
            f"{self.in_flight} in flight",
        ]
        facts.append(f"{len(self._script)} scripted behaviours left")
        facts += [f"raised {error!r}" for error in self.errors]
        return "; ".join([*facts, *map(str, self.requests)])

    def _accept(self) -> Connection:
        connection = Connection(self.connections + 1, self._serve, self._changes.notify)
        self._connections.append(connection)
        return connection

    async def _serve(self, connection: Connection) -> None:
        try:
            while (request := await connection.next_request()) is not None:
                await self._handle(connection, request)
        except BadRequest as error:
            exchange = self._make_exchange(
                RecordedRequest(method="", path="", connection=connection.number), connection
            )
            with contextlib.suppress(ConnectionError):
                await reply(400, completions.error_body(str(error), "invalid_request_error"))(exchange)
        finally:
            connection.hang_up()

    async def _handle(self, connection: Connection, request: RecordedRequest) -> None:
        name, purpose = QUESTION_HEADER
        is_question = request.path in TOKEN_COUNTS or request.headers.get(name) == purpose
        if request.path in self._by_path or not is_question:
            self.requests.append(request)
        if connection.request_count and self.hang_up_reused > 0:
            self.hang_up_reused -= 1
            request.refused = True
            connection.hang_up()
            return
        exchange = self._make_exchange(request, connection)
        generates = request.method != "GET"
        self.in_flight += generates
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        connection.busy = True
        self._changes.notify()
        try:
            await self._run_behaviour(self._choose_behaviour(request), exchange, connection)
        finally:
            connection.busy = False
            connection.request_count += 1
            self.in_flight -= generates
            self._record_outcome(exchange, connection)
            self._changes.notify()

    def _make_exchange(self, request: RecordedRequest, connection: Connection) -> Exchange:
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

    def _choose_behaviour(self, request: RecordedRequest) -> Behaviour:
        if request.path in self._by_path:
            return self._by_path[request.path]
        if request.method == "GET":
            return self._answer_get(request)
        if request.path in TOKEN_COUNTS:
            return self._not_found(request)
        if self._script:
            return self._script.popleft()
        model = request.fields.get("model")
        if isinstance(model, str) and model in self._by_model:
            return self._by_model[model]
        return self.default if request.path in GENERATIONS else self._not_found(request)

    def _answer_get(self, request: RecordedRequest) -> Behaviour:
        if request.path == "/v1/models":
            return reply(200, completions.model_list(self.models))
        return self._not_found(request)

    def _not_found(self, request: RecordedRequest) -> Behaviour:
        message = f"Invalid URL ({request.method} {request.path})"
        return reply(404, completions.error_body(message, "invalid_request_error"))

    async def _run_behaviour(self, behaviour: Behaviour, exchange: Exchange, connection: Connection) -> None:
        try:
            await behaviour(exchange)
            if not connection.is_disconnected:
                await exchange.end()
            await connection.flush()
        except asyncio.CancelledError as error:
            if not connection.cancelled:
                # The behaviour itself was not cancelled. It awaited something that was.
                await self._report_failure(error, exchange, connection)
            elif not connection.client_disconnected:
                raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - close() raises it, even a pytest.fail()
            if not (connection.client_disconnected and isinstance(error, ConnectionError)):
                await self._report_failure(error, exchange, connection)

    async def _report_failure(self, error: BaseException, exchange: Exchange, connection: Connection) -> None:
        """Stores the exception, and replies with status 500, so that the test does not wait for a reply."""
        self.errors.append(error)
        if not (exchange.started or connection.is_disconnected):
            body = completions.error_body(f"the behaviour of the scripted server raised {error!r}", "server_error")
            await reply(500, body)(exchange)
        connection.hang_up()

    def _record_outcome(self, exchange: Exchange, connection: Connection) -> None:
        request = exchange.request
        request.finished = exchange.ended and connection.all_bytes_sent
        request.aborted = connection.client_disconnected and not request.finished
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
            or (self._max_requests is not None and connection.request_count >= self._max_requests)
        )


async def close_listener(listener: asyncio.Server) -> None:
    """Stops accepting connections before it closes the listener.

    Otherwise asyncio may lose a connection that it is just accepting (python/cpython#109564).
    """
    loop = asyncio.get_running_loop()
    for listening in listener.sockets:
        # The proactor of Windows does not have this method, and does not need it.
        with contextlib.suppress(NotImplementedError):
            loop.remove_reader(listening.fileno())
    # Connections that were accepted before become a `Connection` in this turn of the loop.
    await asyncio.sleep(0)
    listener.close()
