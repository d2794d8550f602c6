"""`NodePool`: several servers behind the interface of one transport.

Each server has its own `Transport`, with its own connections, limits and schedule; the pool only decides which of
them gets a request. The rules for choosing a server are in `node.py`, and those for what happens after a failure are in
`failover.py`. The division is that of elastic-transport, whose node pool knows nothing of requests, and whose nodes
know nothing of each other.

The alternative was one schedule for all servers, from which each server takes its next request. A request would then
never wait at one server while another is idle. But the scheduler guarantees that every wait is bounded and that no
model is unloaded during a generation, and it can do so only for the models in the memory of a single server. And
whether a request reaches the server that has its prompt in the cache would be a matter of luck.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

import attrs
import msgspec

from lmbridge._checks import wrong_type
from lmbridge._copying import NotCopyable
from lmbridge._tasks import LoopGuard, SingleFlight, mark_exception_retrieved, settle
from lmbridge.config import Timeouts
from lmbridge.errors import LLMError, LLMTimeoutError, LLMValidationError, TaskCancelledError
from lmbridge.transport.calls import Reply, Request
from lmbridge.transport.events import EventStream
from lmbridge.transport.failover import Delivery, whole_body
from lmbridge.transport.failover_interface import MovedToAnotherServer
from lmbridge.transport.forwarding import ForwardedResponse
from lmbridge.transport.interpreter import Interpreter
from lmbridge.transport.limit_search import SEARCH_PATIENCE
from lmbridge.transport.node import FindModels, Node, choose_node
from lmbridge.transport.prefix import SentConversation, WarmPrefixes, conversation_in, response_key
from lmbridge.transport.retry import Verdict
from lmbridge.transport.transport import Transport

if TYPE_CHECKING:
    from lmbridge.transport.stats import ClientStats

logger: logging.Logger = logging.getLogger("lmbridge.transport")

MODELS_WAIT_SECONDS: Final = 1.0
"""The most seconds that a request waits for servers to list their models. After that, what is known decides."""
MODELS_AGE: Final = 60.0
"""The seconds after which a list of models is requested again. Meanwhile, requests are distributed by the old list."""
LOOK_UP_PAUSE: Final = 5.0
"""The shortest time between two look-ups at one server, in seconds."""
CHECK_SECONDS: Final = 5.0
"""The most seconds that a server may take to answer the question whether it works."""

_Answer = TypeVar("_Answer", Reply, EventStream | Reply, ForwardedResponse)
_Send = Callable[[Transport, Request], Awaitable[_Answer]]


class _ResponseId(msgspec.Struct):
    id: str


class NodePool(NotCopyable):
    """Several servers. Each request goes to the one that is best suited for it.

    `LLMClient(api_base=[...])` makes one with the same options for each server. Make it yourself if the servers have
    different options, or if several clients share it::

        transports = [
            Transport("http://127.0.0.1:1234", limits=Limits(max_concurrency=4)),
            Transport("https://gpu.example/v1", api_key="..."),
        ]
        async with NodePool(transports) as pool:
            client = LLMClient(transport=pool, model="qwen3-4b")

    docs/several-servers.md describes which server is chosen, and what happens when one fails.

    Args:
        transports: A transport for each server. The pool closes them when it is closed.
        prefer_warm: Whether a conversation prefers the server that has answered it before, which has its prompt in
            the cache. The default is True.

    Raises:
        LLMValidationError: No transport was passed, or two of them lead to the same server.
    """

    _instead_of_a_copy = "pass the pool itself on, and create another one in each process"

    def __init__(self, transports: Sequence[Transport], *, prefer_warm: bool = True) -> None:
        self.nodes: Final[tuple[Transport, ...]] = _checked(transports)
        """The transport of each server."""
        self.api_base: Final = ", ".join(transport.api_base for transport in self.nodes)
        """The URLs of the servers, separated by commas."""
        self._nodes = [Node(transport) for transport in self.nodes]
        self._prefer_warm = prefer_warm
        self._warm: WarmPrefixes[tuple[Node, int]] = WarmPrefixes()
        # The servers that have stored responses, which only they can continue.
        self._owners: WarmPrefixes[Node] = WarmPrefixes()
        self._numbers = itertools.count(1)
        self._moves: Counter[str | None] = Counter()
        self._look_ups: set[asyncio.Task[None]] = set()
        # On cancellation of all requests, the question goes on: the next request benefits from the answer.
        self._limits: SingleFlight[None] = SingleFlight(
            "the client was closed while it asked for the servers' limits", keep_going=True
        )
        # The value of `_restarts` when the servers were last asked for their limits; None if they have not been asked.
        self._limits_known_at: int | None = None
        # The number of requests for which no server has been chosen yet.
        self._arriving = 0
        self._guard = LoopGuard("this client")
        self._closing: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.api_base}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # The current state

    def stats(self) -> ClientStats:
        """Returns the numbers of all servers together, and in `by_server` those of each of them."""
        from lmbridge.transport.stats import combined_stats  # noqa: PLC0415 - as in `Transport.stats`

        return combined_stats(
            [node.transport.stats() for node in self._nodes],
            unavailable={node.transport.api_base for node in self._nodes if node.is_down},
            moves=self._moves,
        )

    @property
    def in_flight(self) -> int:
        """The number of generations in flight at all servers."""
        return sum(transport.in_flight for transport in self.nodes)

    @property
    def queued(self) -> int:
        """The number of generations that are waiting for a permit."""
        return sum(transport.queued for transport in self.nodes)

    @property
    def busy(self) -> bool:
        """Whether a request or a stream is in flight, or a request is waiting."""
        return any(node.underway or node.transport.busy for node in self._nodes)

    @property
    def closing(self) -> asyncio.Future[None] | None:
        """A future that is done once the open pool begins to close; None if the pool is not open."""
        return self._closing

    def owns_url(self, url: str) -> bool:
        """Returns whether a request with this URL goes to one of the servers."""
        return any(transport.owns_url(url) for transport in self.nodes)

    def redact(self, text: str, headers: Mapping[str, str] | None = None) -> str:
        """Returns the text without the key of any server, and without the values of the headers."""
        for transport in self.nodes:
            text = transport.redact(text, headers)
        return text

    # Requests

    async def request(self, request: Request) -> Reply:
        """Sends a request to one of the servers, and returns the complete reply, whatever its status.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMError: The errors of `Transport.request`. `context["tried"]` lists the servers that have failed.
        """
        return await self._deliver(request, lambda transport, request: transport.request(request))

    async def stream(self, request: Request) -> EventStream | Reply:
        """Sends a request for an event stream to one of the servers, and returns the stream when it has begun.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMError: The errors of `Transport.stream`. `context["tried"]` lists the servers that have failed.
        """
        return await self._deliver(request, lambda transport, request: transport.stream(request))

    async def forward(self, request: Request) -> ForwardedResponse:
        """Sends a request to one of the servers, and returns the response to be passed on unchanged.

        On cancellation of the caller, the connection is closed and the permit is returned.

        Raises:
            LLMError: The errors of `Transport.forward`. `context["tried"]` lists the servers that have failed.
        """
        return await self._deliver(request, lambda transport, request: transport.forward(request))

    async def close(self) -> None:
        """Ends every request and stream with a `TaskCancelledError`, and closes all connections.

        Closing a pool that is not open does nothing.

        Raises:
            LLMError: The pool is open in another event loop that is still alive.
        """
        self._guard.check()
        closing, self._closing = self._closing, None
        self._limits_known_at = None
        self._guard = LoopGuard("this client")
        if closing is not None and not closing.get_loop().is_closed():
            closing.set_result(None)
        await settle(self._close_all(self._forget_look_ups()))

    async def _close_all(self, look_ups: Sequence[asyncio.Task[None]]) -> None:
        for task in look_ups:
            task.cancel()
        if look_ups:
            await asyncio.wait(look_ups)
        await self._limits.cancel_all()
        outcomes = await asyncio.gather(*(transport.close() for transport in self.nodes), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    # One request

    async def _deliver(self, request: Request, send: _Send[_Answer]) -> _Answer:
        closing = self._ensure_open()
        delivery = Delivery(self._nodes, request, self._conversation_of(request))
        self._arriving += 1
        try:
            await self._learn_models(request)
            if request.queued and self._limits_known_at != self._restarts():
                await self._learn_limits()
        finally:
            self._arriving -= 1
        wait = 0.0
        while True:
            if wait:
                # This is a sleep that ends early if the pool is closed.
                await asyncio.wait((closing,), timeout=wait)
            if closing.done():
                raise _closed_error(request, self.api_base)
            node = self._choose(delivery)
            if delivery.tried:
                logger.info("%s: %s; trying %s", request.operation, delivery.tried[-1], node.transport.api_base)
            try:
                return await self._send_to(node, delivery, send)
            except MovedToAnotherServer as moved:
                wait = moved.wait
            self._moves[request.model] += 1

    async def _send_to(self, node: Node, delivery: Delivery, send: _Send[_Answer]) -> _Answer:
        request = attrs.evolve(delivery.request, failover=delivery)
        delivery.begin_at(node)
        node.last_chosen = next(self._numbers)
        node.underway += 1
        try:
            answer = await send(node.transport, request)
        except LLMTimeoutError as error:
            # The server may have hung, so it is asked whether it still answers before it gets further requests.
            if error.phase == "first_byte":
                node.note_failure(asyncio.get_running_loop().time(), error.message)
            raise
        finally:
            node.underway -= 1
        self._note_answer(node, delivery, answer.status, whole_body(answer))
        return answer

    def _conversation_of(self, request: Request) -> SentConversation:
        if not request.queued or request.path.endswith("/embeddings"):
            return SentConversation()
        return conversation_in(request.body)

    def _choose(self, delivery: Delivery) -> Node:
        candidates = delivery.candidates()
        conversation, model = delivery.conversation, delivery.request.model
        if conversation.previous_response_id is not None:
            owner = self._owners.find((response_key(conversation.previous_response_id),))
            if owner is not None and owner in candidates:
                return owner
        node = choose_node(candidates, model, self._warm_node(conversation.keys) if self._prefer_warm else None)
        node.expect(model)
        return node

    def _warm_node(self, keys: tuple[bytes, ...]) -> Node | None:
        node, restarts = self._warm.find(keys) or (None, 0)
        return node if node is not None and node.restarts == restarts else None

    def _note_answer(self, node: Node, delivery: Delivery, status: int, body: bytes | None) -> None:
        """Records which server has the prompt of a conversation in its cache, and which one has stored a response."""
        if body is None:
            # The body will not be sent again, and many open streams may have long prompts. `OpenState.adopt` drops the
            # body of the transport's own copy of the request for the same reason.
            delivery.request.body = None
        if status >= 400:
            return
        if keys := delivery.conversation.keys:
            self._warm.remember(keys[-1], (node, node.restarts))
        if body is not None and delivery.request.path.endswith("/responses"):
            with suppress(msgspec.DecodeError):
                response = msgspec.json.decode(body, type=_ResponseId)
                self._owners.remember(response_key(response.id), node)

    # Models and health

    async def _learn_models(self, request: Request) -> None:
        """Asks servers about their models if that is due, and waits briefly for those whose models are not known.

        On cancellation of the caller, the look-ups go on.
        """
        now = asyncio.get_running_loop().time()
        waited_for = []
        # `request.queued` does not matter here: counting tokens needs no permit, but it needs a server with the model.
        needs_models = request.model is not None and request.interpreter.find_models is not None
        is_missing = needs_models and all(node.state_of(request.model) == "missing" for node in self._nodes)
        for node in self._nodes:
            if node.is_down:
                if now >= node.check_at:
                    self._start_look_up(node, request.interpreter.find_models, now)
                continue
            age = now - node.listed_at
            if needs_models and (is_missing or age > MODELS_AGE) and now - node.look_up_at >= LOOK_UP_PAUSE:
                self._start_look_up(node, request.interpreter.find_models, now)
            if node.look_up is not None and (is_missing or node.models is None):
                waited_for.append(node.look_up)
        if waited_for:
            await asyncio.wait(waited_for, timeout=MODELS_WAIT_SECONDS)

    async def _learn_limits(self) -> None:
        """Waits briefly until the servers have reported their limits, if more than one request is underway.

        Without this, the requests of a program that starts many at once would be divided equally between a server with
        one slot and one with eight.
        """
        # A request is underway before it is in flight or queued, because its transport may ask for the limits as well.
        if self._arriving > 1 or self.in_flight or any(node.underway for node in self._nodes):
            with suppress(TaskCancelledError):
                await self._limits.run("limits", self._ask_for_limits)

    async def _ask_for_limits(self) -> None:
        # A server that is down is not asked. When it comes back, this number grows, so that all servers are asked anew.
        # Those that have answered before get no further request.
        asked_at = self._restarts()
        questions = [node.transport.learn_limits() for node in self._nodes if not node.is_down]
        # An answer that takes longer is put in force when it arrives.
        with suppress(TimeoutError):
            async with asyncio.timeout(SEARCH_PATIENCE):
                for outcome in await asyncio.gather(*questions, return_exceptions=True):
                    if isinstance(outcome, BaseException) and not isinstance(outcome, LLMError):
                        raise outcome
        self._limits_known_at = asked_at

    def _restarts(self) -> int:
        """Returns how often servers have come back after a failure."""
        return sum(node.restarts for node in self._nodes)

    def _start_look_up(self, node: Node, find_models: FindModels | None, now: float) -> None:
        if node.look_up is not None:
            return
        node.look_up_at = now
        node.look_up = task = asyncio.get_running_loop().create_task(self._look_up(node, find_models))
        self._look_ups.add(task)
        # The coroutine cannot do this at its end, because it never runs if its task is cancelled before its first step.
        task.add_done_callback(partial(self._on_look_up_done, node))

    def _on_look_up_done(self, node: Node, task: asyncio.Task[None]) -> None:
        self._look_ups.discard(task)
        # Another look-up may have been started meanwhile, if this one was forgotten.
        if node.look_up is task:
            node.look_up = None
        mark_exception_retrieved(task)

    def _forget_look_ups(self) -> list[asyncio.Task[None]]:
        """Forgets the look-ups, so that the next request starts others. Returns those that may still be running."""
        running = [task for task in self._look_ups if not task.get_loop().is_closed()]
        self._look_ups.clear()
        for node in self._nodes:
            node.look_up = None
        return running

    async def _look_up(self, node: Node, find_models: FindModels | None) -> None:
        """Asks a server which models it has, which also shows whether it works."""
        loop = asyncio.get_running_loop()
        try:
            models = await (_check(node.transport) if find_models is None else find_models(node.transport))
        except TaskCancelledError:
            return
        except LLMError as error:
            logger.debug("%s did not list its models: %s", node.transport.api_base, error)
            if error.status is None or error.status >= 500:
                node.note_failure(loop.time(), self.redact(error.message))
            else:
                node.note_success()
                node.set_models(None, loop.time())
        else:
            node.note_success()
            node.set_models(models, loop.time())

    # The state in an event loop

    def _ensure_open(self) -> asyncio.Future[None]:
        if self._guard.enter():
            # The futures and tasks of the former loop are lost.
            self._closing = None
            self._forget_look_ups()
            self._limits_known_at, self._arriving = None, 0
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        return self._closing


async def _check(transport: Transport) -> None:
    """Asks a server whether it works.

    Raises:
        LLMError: The server did not answer, or answered with a status of 500 or more.
    """
    request = Request(
        operation="health check",
        method="GET",
        path="/models",
        interpreter=Interpreter(classify=lambda _status, _headers, _body: Verdict.FAIL),
        timeouts=Timeouts(connect=CHECK_SECONDS, first_byte=CHECK_SECONDS),
        max_retries=0,
        queued=False,
    )
    reply = await transport.request(request)
    if reply.status >= 500:
        raise LLMError(f"the server answered {reply.status}", status=reply.status, context=reply.call.context())


def _checked(transports: Iterable[Transport]) -> tuple[Transport, ...]:
    if isinstance(transports, str) or not isinstance(transports, Sequence):
        raise wrong_type("transports", "a list of transports", transports, "NodePool([Transport(url), ...])")
    for each in transports:
        if not isinstance(each, Transport):
            raise wrong_type("transports", "a list of transports", each, "NodePool([Transport(url), ...])")
    if not transports:
        raise LLMValidationError("transports is empty", hint="pass at least one transport")
    counts = Counter(transport.api_base for transport in transports)
    if repeated := [url for url, count in counts.items() if count > 1]:
        raise LLMValidationError(
            f"{repeated[0]} is listed twice",
            hint="list each server once; Limits(max_concurrency=...) says how many requests it gets at a time",
        )
    return tuple(transports)


def _closed_error(request: Request, api_base: str) -> TaskCancelledError:
    context = {"operation": request.operation, "url": api_base, "model": request.model}
    return TaskCancelledError("the client was closed before the reply was complete", context=context)
