"""`LLMClientPool`: a bounded number of clients, each with a model of its own, over one transport."""

from __future__ import annotations

import asyncio
import ssl as ssl_module
import warnings
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Final, Literal, NoReturn, Self, cast

import attrs

from lmbridge._checks import check_integer, check_model_name
from lmbridge.client.auto import Auto
from lmbridge.client.llm import LLMClient
from lmbridge.client.names import Mismatch
from lmbridge.config import Limits, Timeouts
from lmbridge.errors import LLMError, LLMValidationError, TaskCancelledError
from lmbridge.transport import Request, Transport

_GIVEN_BACK: Final = (
    "this client was given back to its pool",
    "get another one with `await pool.get_client()`, or `async with pool.client()`",
)
_CLOSED: Final = ("the pool is closed", "make a new LLMClientPool, and close it when nobody needs it any more")


@attrs.frozen(kw_only=True)
class PoolStats:
    """What a pool is doing at the moment."""

    size: int
    """Clients that may be out at a time."""
    in_use: int
    """Clients that are out."""
    waiting: int
    """Callers that wait for one."""


@attrs.frozen(eq=False)
class _Waiter:
    model: str | None
    future: asyncio.Future[PooledClient]


class LLMClientPool:
    """At most `pool_size` clients at a time, first come, first served, each for one model.

    They share one transport: its connections, and its limit on generations in flight, which is never more than
    `pool_size`. A pool belongs to the event loop that first gets a client from it. Unlike a client, it does not open
    again once it is closed.

    Args:
        pool_size: Clients that may be out at a time.
        api_base: As for `LLMClient`.
        model: For clients that are got without one. Default: `DEFAULT_MODEL`, else the server's choice.
        api_key: As for `LLMClient`.
        timeout: As for `LLMClient`.
        max_retries: As for `LLMClient`.
        limits: As for `LLMClient`; `max_concurrency` is `pool_size` by default, and at most that.
        model_mismatch: As for `LLMClient`; "warn" logs a line for each pair of names in the whole pool.
        ssl: As for `LLMClient`.
        trust_env: As for `LLMClient`.
        transport: Connections and limits to share beyond this pool, in place of the options about them. It stays its
            owner's to close, and its own limits count.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    def __init__(
        self,
        pool_size: int = 10,
        *,
        api_base: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        timeout: Timeouts | None = None,
        max_retries: int = 2,
        limits: Limits | Literal["auto"] | None = None,
        model_mismatch: Mismatch = "warn",
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        transport: Transport | None = None,
    ) -> None:
        check_integer("pool_size", pool_size)
        if limits is None and transport is None:
            limits = Limits(max_concurrency=pool_size)
        elif limits == "auto":
            limits = cast("Literal['auto']", Auto(at_most=pool_size))
        elif isinstance(limits, Limits):
            limits = attrs.evolve(limits, max_concurrency=min(limits.max_concurrency, pool_size))
        self._size = pool_size
        self._timeout = timeout
        self._max_retries = max_retries
        # It checks the options, and owns what all others share; it is never given out.
        self._client = LLMClient(
            api_base,
            model,
            api_key,
            timeout=timeout,
            max_retries=max_retries,
            limits=limits,
            model_mismatch=model_mismatch,
            ssl=ssl,
            trust_env=trust_env,
            transport=transport,
        )
        self._retired = _Refusal(self._client._server.transport, *_GIVEN_BACK)  # noqa: SLF001 - a client of ours
        # Weak: a client that is dropped gives its slot back. By id, because that needs no live object.
        self._out: dict[int, weakref.ref[PooledClient]] = {}
        self._waiters: dict[_Waiter, None] = {}  # a queue from which any one can leave
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._out)} of {self._size} in use"
        return f"<{type(self).__name__} {self._client.api_base} {state}>"

    async def __aenter__(self) -> Self:
        if self._closed:
            raise _closed_error()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def model(self) -> str | None:
        """The model of clients that are got without one."""
        return self._client.model

    async def get_client(self, model: str | None = None) -> LLMClient:
        """Waits for a client; give it back with `release_client`, or by closing it.

        Args:
            model: What the client asks for where a call names none; default: the pool's.

        Raises:
            LLMValidationError: the model's name cannot be right.
            LLMError: the pool is closed, or belongs to another event loop.
            TaskCancelledError: the pool was closed meanwhile.
        """
        model = check_model_name(model) or self._client.model
        loop = self._enter()
        if not self._waiters and len(self._out) < self._size:
            return self._give(model)
        waiter = _Waiter(model, loop.create_future())
        self._waiters[waiter] = None
        try:
            return await waiter.future
        except BaseException:
            if waiter.future.done() and not waiter.future.cancelled() and not waiter.future.exception():
                self._take_back(waiter.future.result())  # given in the same moment: pass it on
            raise
        finally:
            self._waiters.pop(waiter, None)

    def release_client(self, client: LLMClient) -> None:
        """Gives a client back, to whoever waits longest.

        Its streams that are still open go on to their end; it sends nothing new.

        Raises:
            LLMValidationError: it is not of this pool, or was given back before.
        """
        if not isinstance(client, PooledClient) or client.pool is not self:
            raise LLMValidationError(
                f"{client!r} is no client of {self!r}", hint="release what get_client() of the same pool returned"
            )
        if not self._take_back(client):
            raise LLMValidationError(
                f"{client!r} was given back before",
                hint="release a client once, or leave it to `async with pool.client()`",
            )

    @asynccontextmanager
    async def client(self, model: str | None = None) -> AsyncGenerator[LLMClient, None]:
        """Waits for a client, and gives it back whichever way the block is left.

        Args:
            model: As for `get_client`.

        Raises:
            LLMError: as for `get_client`.
        """
        async with await self.get_client(model) as client:
            yield client

    def stats(self) -> PoolStats:
        """How many clients there may be, are out, and are waited for."""
        return PoolStats(size=self._size, in_use=len(self._out), waiting=len(self._waiters))

    async def close(self) -> None:
        """Ends what is in flight, and every wait for a client, with `TaskCancelledError`; idempotent.

        What goes through a `transport` that was given goes on, but no client of the pool sends anything new.

        Raises:
            LLMError: the pool belongs to another event loop that is still alive.
        """
        if not self._closed:
            if self._loop is not None and self._loop is not asyncio.get_running_loop() and not self._loop.is_closed():
                raise _wrong_loop()
            self._closed = True
            self._end()
        await self._client.close()

    def _end(self) -> None:
        refusal = _Refusal(self._client._server.transport, *_CLOSED)  # noqa: SLF001 - a client of ours
        for reference in list(self._out.values()):
            if (client := reference()) is not None:
                _divert(client, refusal)
        waiters = list(self._waiters)
        self._waiters.clear()
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_exception(TaskCancelledError("the pool was closed while this waited for a client"))

    # Slots

    def _enter(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise _closed_error()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise _wrong_loop()
            self._loop = loop
            self._waiters.clear()  # they were of a loop that is gone
        return loop

    def _give(self, model: str | None) -> PooledClient:
        client = PooledClient(self, self._client, model, timeout=self._timeout, max_retries=self._max_retries)
        self._out[id(client)] = weakref.ref(client)
        return client

    def _take_back(self, client: PooledClient) -> bool:
        """Frees the client's slot; whether it had one."""
        if self._out.pop(id(client), None) is None:
            return False
        if not self._closed:
            _divert(client, self._retired)
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._admit()
        else:
            self._admit_soon()
        return True

    def _drop(self, client: PooledClient) -> bool:
        """Frees the slot of a client that is being collected, in any thread; whether that was too soon."""
        if self._out.pop(id(client), None) is None:
            return False
        self._admit_soon()  # not now: it may be collected in the midst of anything, `_admit` included
        return not self._closed

    def _admit_soon(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits in it
                self._loop.call_soon_threadsafe(self._admit)

    def _admit(self) -> None:
        while self._waiters and len(self._out) < self._size:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            if not waiter.future.done():
                waiter.future.set_result(self._give(waiter.model))


class PooledClient(LLMClient):
    """A client that is out: it has a slot of its pool until it is released, closed, or dropped."""

    def __init__(
        self, pool: LLMClientPool, owner: LLMClient, model: str | None, *, timeout: Timeouts | None, max_retries: int
    ) -> None:
        server = owner._server  # noqa: SLF001 - the pool's own client
        super().__init__(model=model, timeout=timeout, max_retries=max_retries, transport=server.transport)
        self._server.names = server.names  # type: ignore[misc]  # Final for others; a pair is logged once a pool
        self.pool: Final = pool

    def __del__(self) -> None:
        pool = getattr(self, "pool", None)  # it may not have come that far
        if pool is not None and pool._drop(self):  # noqa: SLF001 - its own pool
            warnings.warn(
                f"{self!r} was dropped and not given back to its pool; use `async with pool.client()`, or release it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    async def close(self) -> None:
        """Gives the client back to its pool; idempotent. Its streams that are still open go on to their end."""
        self.pool._take_back(self)  # noqa: SLF001 - its own pool


class _Refusal(Transport):
    """What takes the transport's place for a client that is not to send any more.

    Args:
        transport: The one before.
        message: Why it refuses.
        hint: What to do instead.
    """

    def __init__(self, transport: Transport, message: str, hint: str) -> None:
        super().__init__(transport.api_base, api_key=transport.api_key)
        self._message = message
        self._hint = hint

    async def request(self, request: Request) -> NoReturn:
        """Refuses."""
        self._refuse(request)

    async def stream(self, request: Request) -> NoReturn:
        """Refuses."""
        self._refuse(request)

    def _refuse(self, request: Request) -> NoReturn:
        context = {"operation": request.operation, "url": self.api_base, "model": request.model}
        raise LLMError(self._message, hint=self._hint, context=context)


def _divert(client: PooledClient, transport: Transport) -> None:
    """Sends the client's later requests through another transport; those under way stay where they are."""
    client._server.transport = transport  # noqa: SLF001 - a client of ours


def _closed_error() -> LLMError:
    message, hint = _CLOSED
    return LLMError(message, hint=hint)


def _wrong_loop() -> LLMError:
    return LLMError(
        "this pool belongs to another event loop that is still alive",
        hint="make one pool for each loop, or close() this one in the loop that used it first",
    )
