"""`ModelValidator`: checks which models a server has, with a list that is cached for some minutes.

No other module imports `cachetools`. Its `TTLCache` is used as a plain mapping whose entries expire. The decorators of
`cachetools` cannot be used: they would cache coroutines instead of results, and do not let concurrent callers share one
request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

import attrs
from cachetools import TTLCache

from lmbridge._checks import (
    check_callable,
    check_integer,
    check_seconds,
    check_text,
    hint_for,
    invalid_argument,
    is_blocking,
    wrong_type,
)
from lmbridge._copying import NotCopyable
from lmbridge._tasks import SingleFlight
from lmbridge.client.llm import LLMClient
from lmbridge.errors import LLMValidationError, ModelNotFoundError, TaskCancelledError

_ModelIds = tuple[str, ...]
_MISPLACED_IN_API_BASE: Final = {
    "LLMClient": "pass it as client=: ModelValidator(client=client)",
    "LLMClientPool": "pass a client of the pool as client=, within `async with pool.client() as client`",
    "Transport": "pass it through a client: ModelValidator(client=LLMClient(transport=transport))",
}
_MISPLACED_IN_CLIENT: Final = {
    "str": "pass the URL of a server as api_base: ModelValidator('http://127.0.0.1:1234/v1')",
    "LLMClientPool": "pass a client of the pool, within `async with pool.client() as client`",
    "Transport": "make a client of it: ModelValidator(client=LLMClient(transport=transport))",
}


@attrs.frozen(kw_only=True)
class CacheStats:
    """Statistics of the cache of a `ModelValidator`."""

    hits: int
    """The number of calls that were answered from the cache. Each call is either a hit or a miss."""
    misses: int
    """The number of calls that asked the server, or waited for another call that was asking it."""
    expirations: int
    """The number of lists that were dropped because they were older than `ttl`.

    Lists that were dropped by `invalidate`, or because of `maxsize`, are not counted.
    """
    size: int
    """The number of lists in the cache now, one for each server."""
    maxsize: int
    """The most lists that the cache can hold."""
    ttl: float
    """The seconds that a list stays in the cache."""


class ModelValidator(NotCopyable):
    """Checks which models a server has, with a list that is cached for some minutes.

    Concurrent calls that find no cached list share one request. A request that fails is not cached. If the client's
    `api_base` is set, the lists of both servers are cached. Use a validator in one event loop at a time. `close`, or
    leaving its `async with` block, ends requests in progress; a later call opens it again::

        async with ModelValidator("http://127.0.0.1:1234/v1") as validator:
            print(await validator.get_available_models())
            await validator.validate_model("qwen3-4b")

    Args:
        api_base: The server, or a list of servers, for a client that the validator creates for itself. Default: that of
            `LLMClient`.
        client: The client to ask, instead of `api_base`. Closing the validator does not close it.
        ttl: The seconds that a list stays in the cache. Default: 600.
        maxsize: The most lists in the cache. When it is full, the least recently used list is dropped. Default: 100.
        timer: The clock, a function that returns seconds. Default: `time.monotonic`.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    _instead_of_a_copy = "pass the validator itself on, and create another one in each process"

    def __init__(
        self,
        api_base: str | Sequence[str] | None = None,
        *,
        client: LLMClient | None = None,
        ttl: float = 600,
        maxsize: int = 100,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if api_base is not None and not isinstance(api_base, str | list | tuple):
            hint = hint_for(api_base, _MISPLACED_IN_API_BASE, "pass the URL of the server as a string")
            raise wrong_type("api_base", "a URL", api_base, hint or "")
        if client is not None and api_base is not None:
            raise LLMValidationError(
                "api_base cannot be combined with client=", hint="set the api_base of the client instead"
            )
        if client is not None and (not callable(getattr(client, "list_models", None)) or is_blocking(client)):
            raise invalid_argument("client", "an LLMClient or None", client, hint_for(client, _MISPLACED_IN_CLIENT))
        check_seconds("ttl", ttl, optional=False)
        check_integer("maxsize", maxsize)
        check_callable("timer", timer, hint="for example time.monotonic")
        self._owns_client = client is None
        self._client: Final = LLMClient(api_base) if client is None else client
        self._timer = timer
        self._now = timer()
        # The cache's clock stands still within an operation, so that lists expire only in `_current_cache`, where they
        # are counted.
        self._cache: TTLCache[str, _ModelIds] = TTLCache(maxsize, ttl, timer=lambda: self._now)
        self._generation = 0
        """Counts calls of `invalidate`: a list that was requested before one of them must not be cached after it."""
        self._requests = SingleFlight[_ModelIds]("the validator was closed during the request")
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
        """Returns the ids of the server's models, in the server's order, as a new list.

        Raises:
            TaskCancelledError: The validator was closed in the meantime.
            LLMError: The same errors as `LLMClient.list_models`. They are not cached: the next call asks again.
        """
        ids = self._current_cache().get(self._client.api_base)
        if ids is not None:
            self._hits += 1
            return list(ids)
        return list(await self._request_ids())

    async def validate_model(self, model: str) -> str:
        """Checks that the server has a model. If the cached list does not have it, the server is asked again.

        The whole id is compared, including `:` and `@`. A name also stands for a listed `name@quantization` (LM Studio)
        and for a listed `name:latest` (Ollama), but not for another tag such as `name:8b`, which in Ollama is another
        model.

        Args:
            model: The name of the model.

        Returns:
            The id as the server lists it. If several quantizations of the model are listed, it is the name itself, and
            the server chooses one of them.

        Raises:
            LLMValidationError: The name is blank or not a string; nothing was sent.
            ModelNotFoundError: The server does not have the model; `available_models` lists those that it has.
            TaskCancelledError: The validator was closed in the meantime.
            LLMError: The same errors as `LLMClient.list_models`.
        """
        check_text("model", model, hint="get_available_models() returns the names that exist")
        listed_id = _find_id(model, self._current_cache().get(self._client.api_base) or ())
        if listed_id is not None:
            self._hits += 1
            return listed_id
        ids = await self._request_ids()
        listed_id = _find_id(model, ids)
        if listed_id is None:
            raise ModelNotFoundError(
                model,
                ids,
                hint="load or download it on the server, or ask for a model that the server has",
                context={"operation": "model look-up", "url": self._client.api_base},
            )
        return listed_id

    async def get_loaded_models(self) -> list[str] | None:
        """Returns the ids of the models that are in the server's memory now, or None if the server does not report it.

        The result is never cached.

        Raises:
            LLMError: The same errors as `LLMClient.server_info`.
        """
        info = await self._client.server_info()
        return None if info.loaded_models is None else list(info.loaded_models)

    def cache_stats(self) -> CacheStats:
        """Returns how often the cache was used, and how full it is."""
        size = len(self._current_cache())
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            expirations=self._expirations,
            size=size,
            maxsize=int(self._cache.maxsize),
            ttl=self._cache.ttl,
        )

    def invalidate(self) -> None:
        """Drops all cached lists. The list of a request in progress is returned to its callers, but not cached."""
        self._current_cache().clear()
        self._generation += 1

    async def close(self) -> None:
        """Ends requests in progress with `TaskCancelledError`, and closes the client if the validator created it.

        It can be called more than once.
        """
        try:
            await self._requests.cancel_all()
        finally:
            if self._owns_client:
                await self._client.close()

    def _current_cache(self) -> TTLCache[str, _ModelIds]:
        """Drops the lists that are too old by now, counts them, and returns the cache."""
        self._now = self._timer()
        self._expirations += len(self._cache.expire())
        return self._cache

    async def _request_ids(self) -> _ModelIds:
        """Returns the server's list, from a request that concurrent callers share."""
        self._misses += 1
        api_base, generation = self._client.api_base, self._generation
        try:
            return await self._requests.run((api_base, generation), lambda: self._fetch(api_base, generation))
        except TaskCancelledError as error:
            error.completed(context={"operation": "model list", "url": api_base})
            raise

    async def _fetch(self, api_base: str, generation: int) -> _ModelIds:
        ids = tuple(await self._client.list_models())
        # If the client's `api_base` was set in the meantime, it is unknown which of the servers has answered.
        if generation == self._generation and api_base == self._client.api_base:
            self._current_cache()[api_base] = ids
        return ids


def _find_id(model: str, ids: Sequence[str]) -> str | None:
    """Returns the listed id that a name stands for, or None."""
    for name in (model, f"{model}:latest"):
        if name in ids:
            return name
    quantizations = [each for each in ids if each.startswith(f"{model}@") and each != f"{model}@"]
    return model if len(quantizations) > 1 else next(iter(quantizations), None)
