"""`ModelValidator`: which models a server has, asked for once in a while. The only importer of `cachetools`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Final, Self

import attrs
from cachetools import TTLCache

from lmbridge._checks import check_callable, check_integer, check_seconds, check_text, invalid_argument
from lmbridge.client.llm import LLMClient
from lmbridge.errors import LLMValidationError, ModelNotFoundError, TaskCancelledError

_Ids = tuple[str, ...]


@attrs.frozen(kw_only=True)
class CacheStats:
    """What a `ModelValidator` has kept, and how often that helped."""

    hits: int
    """Calls that were answered from the cache."""
    misses: int
    """Calls that had to ask the server, or to wait for one that was asking it. Each call is a hit or a miss."""
    expirations: int
    """Lists that were found to be too old. Those that `invalidate` or `maxsize` removed are not among them."""
    size: int
    """Lists that are kept now, one for each server."""
    maxsize: int
    """Lists that are kept at most."""
    ttl: float
    """Seconds that a list is kept."""


class ModelValidator:
    """Says which models a server has, from a list that it keeps for some minutes.

    Concurrent calls that find no list share one request. A request that fails is not remembered. If a client's
    `api_base` is set, the lists of both servers are kept. Use it in one event loop at a time; `close`, or leaving its
    `async with`, ends what it is doing, and a later call opens it again.

    Args:
        api_base: The server, for a client of the validator's own. Default: as for `LLMClient`.
        client: The client to ask, in place of `api_base`. It stays its owner's to close.
        ttl: Seconds that a list is kept.
        maxsize: Lists that are kept; beyond it, the one that was not used for the longest time goes.
        timer: The clock, in seconds.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    def __init__(
        self,
        api_base: str | None = None,
        *,
        client: LLMClient | None = None,
        ttl: float = 600,
        maxsize: int = 100,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if client is not None and api_base is not None:
            raise LLMValidationError("api_base given beside client=", hint="set it at the client instead")
        if client is not None and not callable(getattr(client, "list_models", None)):
            raise invalid_argument("client", "an LLMClient or None", client)
        check_seconds("ttl", ttl, optional=False)
        check_integer("maxsize", maxsize)
        check_callable("timer", timer, hint="for example time.monotonic")
        self._owns_client = client is None
        self._client: Final = LLMClient(api_base) if client is None else client
        self._timer = timer
        self._now = timer()
        # Its clock stands still within an operation: so what expires does so in `_lists` alone, where it is counted.
        self._cache: TTLCache[str, _Ids] = TTLCache(maxsize, ttl, timer=lambda: self._now)
        self._generation = 0
        self._flights: list[_Flight] = []
        self._hits = self._misses = self._expirations = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._client.api_base}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get_available_models(self) -> list[str]:
        """The ids of the server's models, as it lists them; the list is the caller's own.

        Raises:
            TaskCancelledError: the validator was closed meanwhile.
            LLMError: as for `LLMClient.list_models`. It is not remembered: the next call asks again.
        """
        ids = self._kept()
        if ids is not None:
            self._hits += 1
            return list(ids)
        return list(await self._ask())

    async def validate_model(self, model: str) -> str:
        """Whether the server has a model. One that is missing from a kept list is looked up afresh.

        An id is compared as it is, with `:` and `@` and all. A name also stands for a listed `name@quantisation`
        (LM Studio) and for a listed `name:latest` (Ollama), but for no other `name:8`: in Ollama that is another model.

        Returns:
            The id as it is listed; the name as given if several of its quantisations are, of which the server chooses.

        Raises:
            LLMValidationError: the name is empty or no string; nothing was sent.
            ModelNotFoundError: the server does not have it; see `available_models`.
            TaskCancelledError: the validator was closed meanwhile.
            LLMError: as for `LLMClient.list_models`.
        """
        check_text("model", model, hint="get_available_models() returns the names that exist")
        found = _find(model, self._kept() or ())
        if found is not None:
            self._hits += 1
            return found
        ids = await self._ask()
        found = _find(model, ids)
        if found is None:
            raise ModelNotFoundError(
                model,
                ids,
                hint="load or download it on the server, or ask for one that is there",
                context={"operation": "look-up", "url": self._client.api_base},
            )
        return found

    async def get_loaded_models(self) -> list[str] | None:
        """The ids of the models that are in the server's memory now, or None if it does not say. Never cached.

        Raises:
            LLMError: as for `LLMClient.server_info`.
        """
        info = await self._client.server_info()
        return None if info.loaded_models is None else list(info.loaded_models)

    def cache_stats(self) -> CacheStats:
        """How often the cache has helped, and what is in it."""
        size = len(self._lists())
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            expirations=self._expirations,
            size=size,
            maxsize=int(self._cache.maxsize),
            ttl=self._cache.ttl,
        )

    def invalidate(self) -> None:
        """Forgets all lists. A list that is on its way reaches those who wait for it, and is not kept."""
        self._lists().clear()
        self._generation += 1

    async def close(self) -> None:
        """Ends requests under way with `TaskCancelledError`, and closes the client if it is its own; idempotent."""
        loop = asyncio.get_running_loop()
        tasks = [flight.task for flight in self._flights if flight.key[0] is loop]
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            if self._owns_client:
                await self._client.close()

    def _lists(self) -> TTLCache[str, _Ids]:
        """The cache as it is now; lists that are too old are counted and gone."""
        self._now = self._timer()
        self._expirations += len(self._cache.expire())
        return self._cache

    def _kept(self) -> _Ids | None:
        return self._lists().get(self._client.api_base)

    async def _ask(self) -> _Ids:
        """The server's list, from a request that all share who ask at the same time."""
        self._misses += 1
        flight = self._flight()
        flight.waiters += 1
        try:
            await asyncio.wait([flight.task])  # which leaves the task alone if its caller is cancelled
        except asyncio.CancelledError:
            flight.waiters -= 1
            if not flight.waiters:
                flight.task.cancel()
                await asyncio.wait([flight.task])
            raise
        if flight.task.cancelled():
            raise TaskCancelledError(
                "the validator was closed meanwhile", context={"operation": "model list", "url": flight.key[1]}
            )
        return flight.task.result()

    def _flight(self) -> _Flight:
        """The request under way that fits, or a new one."""
        loop = asyncio.get_running_loop()
        api_base, generation = self._client.api_base, self._generation
        key = (loop, api_base, generation)
        for flight in self._flights:
            if flight.key == key and flight.waiters:
                return flight
        flight = _Flight(key, loop.create_task(self._fetch(api_base, generation)))
        self._flights.append(flight)
        flight.task.add_done_callback(partial(self._landed, flight))
        return flight

    def _landed(self, flight: _Flight, task: asyncio.Task[_Ids]) -> None:
        self._flights.remove(flight)
        _ = task.cancelled() or task.exception()  # or asyncio complains of an error that nobody waited for

    async def _fetch(self, api_base: str, generation: int) -> _Ids:
        ids = tuple(await self._client.list_models())
        # A client that was sent elsewhere meanwhile may have asked either server.
        if generation == self._generation and api_base == self._client.api_base:
            self._lists()[api_base] = ids
        return ids


@attrs.define(eq=False)
class _Flight:
    """A request for a list, and how many wait for it; without waiters it is being cancelled."""

    key: tuple[asyncio.AbstractEventLoop, str, int]
    """Its loop, the server's `api_base`, and the generation of the cache that it is for."""
    task: asyncio.Task[_Ids]
    waiters: int = 0


def _find(model: str, ids: Sequence[str]) -> str | None:
    for name in (model, f"{model}:latest"):
        if name in ids:
            return name
    quantisations = [each for each in ids if each.startswith(f"{model}@") and each != f"{model}@"]
    return model if len(quantisations) > 1 else next(iter(quantisations), None)
