"""`LLMClientPool`: a bounded number of clients, each with its own default model, over one transport.

Each lease is a new client. Changing the model of a shared client instead would let two tasks see each other's model. A
lease costs next to nothing, because connections and limits belong to the transport, which all leases share. A lease
that was given back refuses further requests; streams that it has opened go on to their end.

Callers that wait are served in the order of their arrival, or of the agents' runs that they belong to. Each waits for a
future of its own. A semaphore or a queue of idle clients would not do, because a caller that is cancelled at the very
moment when it gets a client has to pass the client on, and `close` has to end all waits with an `LLMError`.
"""

from __future__ import annotations

import asyncio
import heapq
import warnings
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self, Unpack, cast

import attrs

from lmbridge._checks import check_integer, check_model_name, hint_for
from lmbridge._copying import NotCopyable
from lmbridge._pending_call import explains_missing_await
from lmbridge._scheduled_run import current_run, next_order_number
from lmbridge._tasks import LoopGuard, call_in_loop
from lmbridge.client.auto_limits import auto_limits, default_limits
from lmbridge.client.llm import ClientOptions, LLMClient
from lmbridge.config import Limits
from lmbridge.errors import LLMError, LLMValidationError, TaskCancelledError

_GIVEN_BACK_MESSAGE_AND_HINT: Final = (
    "this client was given back to its pool",
    "get another one with `await pool.get_client()`, or `async with pool.client()`",
)
_MISPLACED: Final = {
    "LLMClient": "a pool makes its clients itself: LLMClientPool(4, api_base=client.api_base)",
    "LLMClientPool": "pass the pool itself on, which serves any number of tasks",
    "Transport": "pass it as transport=: LLMClientPool(4, transport=transport)",
    "str": "pass the URL of a server as api_base=: LLMClientPool(api_base='http://127.0.0.1:1234/v1')",
}
_CLOSED_MESSAGE_AND_HINT: Final = (
    "the pool is closed",
    "create a new LLMClientPool, and close it when it is no longer needed",
)


@attrs.frozen(kw_only=True)
class PoolStats:
    """Statistics of a pool at one moment."""

    size: int
    """The most clients that can be in use at the same time: the `pool_size` of the pool."""
    in_use: int
    """The number of clients that are in use."""
    waiting: int
    """The number of callers that are waiting for a client."""


@attrs.frozen(eq=False)
class _Waiter:
    model: str | None
    future: asyncio.Future[PooledClient]
    number: int
    """The position in the order of waiters: that of the run, or of the caller itself if it belongs to no run."""


class LLMClientPool(NotCopyable):
    """Hands out at most `pool_size` clients at the same time, each with its own default model.

    Callers that wait for a client are served in the order of their arrival. Those that belong to an agent's run are
    served in the order of the runs.

    The clients share one transport: its connections, and its limit on generations in flight, which is never more than
    `pool_size`. A pool belongs to the event loop that first gets a client from it. Unlike a client, it does not open
    again once it is closed::

        async with LLMClientPool(pool_size=4) as pool, pool.client("qwen3-4b") as client:
            reply = await client.chat_completion([{"role": "user", "content": "Hello!"}])

    Args:
        pool_size: The most clients that can be in use at the same time. Default: 10.
        **options: The options of the clients, which `LLMClient` documents, as keyword arguments. Some apply to the
            whole pool: `model` is the model of clients that are requested without one. The `max_concurrency` of
            `limits` is never more than `pool_size`. Without `limits` it is `pool_size`, or less if a server on this
            machine or in a private network reports fewer slots. With `model_mismatch="warn"`, each pair of names is
            logged once for the whole pool. A `transport` is shared beyond the pool: its own limits apply, and it stays
            open when the pool is closed.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    _instead_of_a_copy = "pass the pool itself on, and create a separate pool in each process"

    def __init__(self, pool_size: int = 10, **options: Unpack[ClientOptions]) -> None:
        check_integer("pool_size", pool_size, hint=hint_for(pool_size, _MISPLACED))
        limits = options.get("limits")
        if limits is None and options.get("transport") is None:
            options["limits"] = cast("Limits", default_limits(pool_size))
        elif limits == "auto":
            options["limits"] = cast("Limits", auto_limits(at_most=pool_size))
        elif isinstance(limits, Limits):
            options["limits"] = attrs.evolve(limits, max_concurrency=min(limits.max_concurrency, pool_size))
        self._size = pool_size
        # This client checks the options and owns what all leases share. It is never handed out.
        self._client = LLMClient(**options)
        # The references are weak, so that a client that is dropped frees its slot. The keys are the results of `id`,
        # which are still known while the client is garbage-collected, when the weak reference may already be dead.
        self._leases: dict[int, weakref.ref[PooledClient]] = {}
        self._waiters: dict[_Waiter, None] = {}
        # A heap of the same waiters, in the order in which they are served. Those that have left are skipped.
        self._next_waiters: list[tuple[int, int, _Waiter]] = []
        self._loop_guard = LoopGuard("this pool")
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._leases)} of {self._size} in use"
        return f"<{type(self).__name__} {self._client.api_base} {state}>"

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def model(self) -> str | None:
        """The model of clients that are requested without one."""
        return self._client.model

    @explains_missing_await
    async def get_client(self, model: str | None = None) -> LLMClient:
        """Waits for a client. Give it back with `release_client`, or by closing it.

        Args:
            model: The model of the client's calls that name none. Default: the pool's model.

        Raises:
            LLMValidationError: The model's name is not valid.
            LLMError: The pool is closed, or is in use in another event loop.
            TaskCancelledError: The pool was closed during the wait.
        """
        model = check_model_name(model) or self._client.model
        self._check_open()
        if self._loop_guard.enter():
            # These waiters belong to an event loop that no longer exists.
            self._waiters.clear()
            self._next_waiters.clear()
        if not self._waiters and len(self._leases) < self._size:
            return self._lease(model)
        waiter = self._enqueue(model)
        try:
            return await waiter.future
        except BaseException:
            if waiter.future.done() and not waiter.future.cancelled() and not waiter.future.exception():
                # The client arrived at the same moment as the cancellation, so it is passed on.
                self._free_slot(waiter.future.result())
            raise
        finally:
            self._waiters.pop(waiter, None)

    def _enqueue(self, model: str | None) -> _Waiter:
        """Adds a waiter, behind those of older runs and of callers that came earlier."""
        run = current_run.get()
        if run is None or run.is_over:
            number = next_order_number()
        else:
            number = run.number
            # The clients may be in use by runs that wait until this run no longer counts as begun.
            run.pause()
        waiter = _Waiter(model, asyncio.get_running_loop().create_future(), number)
        self._waiters[waiter] = None
        heapq.heappush(self._next_waiters, (number, next_order_number(), waiter))
        if len(self._next_waiters) > 2 * len(self._waiters) + 8:
            # A sorted list is a heap.
            self._next_waiters = sorted(entry for entry in self._next_waiters if entry[2] in self._waiters)
        return waiter

    def release_client(self, client: LLMClient) -> None:
        """Gives a client back. The first of the callers that wait gets the slot.

        Streams that the client has opened go on to their end. A further request raises an `LLMError`.

        Args:
            client: A client that `get_client` of this pool has returned.

        Raises:
            LLMValidationError: The client does not belong to this pool, or was already given back.
        """
        if not isinstance(client, PooledClient) or client.pool is not self:
            raise LLMValidationError(
                f"{client!r} does not belong to {self!r}",
                hint="release a client that get_client() of this pool returned",
            )
        if not self._free_slot(client):
            raise LLMValidationError(
                f"{client!r} was already given back",
                hint="release a client once, or leave it to `async with pool.client()`",
            )

    @asynccontextmanager
    async def client(self, model: str | None = None) -> AsyncGenerator[LLMClient, None]:
        """Waits for a client, and gives it back at the end of the `async with` block.

        Args:
            model: The model of the client's calls that name none. Default: the pool's model.

        Raises:
            LLMError: The same errors as `get_client`.
        """
        async with await self.get_client(model) as client:
            yield client

    def stats(self) -> PoolStats:
        """Returns how many clients the pool can hand out, how many are in use, and how many callers are waiting."""
        return PoolStats(size=self._size, in_use=len(self._leases), waiting=len(self._waiters))

    async def close(self) -> None:
        """Ends requests in progress and all waits for a client with `TaskCancelledError`.

        It can be called more than once.

        Requests that go through a `transport` which was passed to the constructor are not ended, but no client of the
        pool sends a new one.

        Raises:
            LLMError: The pool is in use in another event loop that is still alive.
        """
        if not self._closed:
            self._loop_guard.check()
            self._closed = True
            self._refuse_everything()
        await self._client.close()

    def _refuse_everything(self) -> None:
        for reference in list(self._leases.values()):
            if (client := reference()) is not None:
                client.refuse_requests(*_CLOSED_MESSAGE_AND_HINT)
        waiters = list(self._waiters)
        self._waiters.clear()
        self._next_waiters.clear()
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_exception(TaskCancelledError("the pool was closed during the wait for a client"))

    def _check_open(self) -> None:
        if self._closed:
            message, hint = _CLOSED_MESSAGE_AND_HINT
            raise LLMError(message, hint=hint)

    # Slots

    def _lease(self, model: str | None) -> PooledClient:
        client = PooledClient(self, self._client, model)
        self._leases[id(client)] = weakref.ref(client)
        return client

    def _free_slot(self, client: PooledClient) -> bool:
        """Frees the slot of a client. Returns whether the client had one."""
        if self._leases.pop(id(client), None) is None:
            return False
        if not self._closed:
            client.refuse_requests(*_GIVEN_BACK_MESSAGE_AND_HINT)
        if self._loop_guard.is_running():
            self._serve_waiters()
        else:
            self._serve_waiters_soon()
        return True

    def _free_slot_of_dropped(self, client: PooledClient) -> bool:
        """Frees the slot of a client that is being collected, in any thread; returns whether it was still in use."""
        if self._leases.pop(id(client), None) is None:
            return False
        # The waiters are served later, because the garbage collector may run at any moment, even in `_serve_waiters`.
        self._serve_waiters_soon()
        return not self._closed

    def _serve_waiters_soon(self) -> None:
        if (loop := self._loop_guard.loop) is not None:
            call_in_loop(loop, self._serve_waiters)

    def _serve_waiters(self) -> None:
        while self._waiters and len(self._leases) < self._size:
            _, _, waiter = heapq.heappop(self._next_waiters)
            # A waiter whose caller was cancelled is still in the heap, but no longer in `_waiters`.
            if waiter not in self._waiters:
                continue
            del self._waiters[waiter]
            if not waiter.future.done():
                waiter.future.set_result(self._lease(waiter.model))


class PooledClient(LLMClient):
    """A client that is in use. It occupies a slot of its pool until it is released, closed or dropped.

    Args:
        pool: The pool that gets the client back.
        owner: The pool's own client, whose options and transport are shared.
        model: The model of calls that name none.
    """

    def __init__(self, pool: LLMClientPool, owner: LLMClient, model: str | None) -> None:
        # LLMClient's own constructor would check the options once more, and make a transport.
        self._attach(owner._server.shared(), model)  # noqa: SLF001 - a client of the same pool
        self.pool: Final = pool

    def __del__(self) -> None:
        # The attribute does not exist if the constructor has failed.
        pool = getattr(self, "pool", None)
        if pool is not None and pool._free_slot_of_dropped(self):  # noqa: SLF001 - its own pool
            warnings.warn(
                f"{self!r} was dropped without being given back to its pool; use `async with pool.client()`,"
                " or release it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def refuse_requests(self, message: str, hint: str) -> None:
        """Makes every further request raise an `LLMError` with this message."""
        self._server.refuse_requests(message, hint)

    async def close(self) -> None:
        """Gives the client back to its pool; can be called more than once. Streams in progress go on to their end."""
        self.pool._free_slot(self)  # noqa: SLF001 - its own pool
