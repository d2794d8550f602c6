"""`ClientSource`: lends a client for each generation, and remembers the context length of each model."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from lmbridge._checks import hint_for, is_blocking
from lmbridge.agent.chat_client import ChatClient, ChatClientPool, ReportsServerInfo
from lmbridge.agent.result_images import ImagePlace
from lmbridge.client.names import is_same_model
from lmbridge.errors import LLMError, LLMValidationError

if TYPE_CHECKING:
    from lmbridge.client.server_info import ServerInfo

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_DISCOVERY_SECONDS: Final = 5.0
"""The time limit of the request for the context length, in seconds."""
_ASK_AGAIN_SECONDS: Final = 60.0
"""Seconds after which an unknown context length is requested again."""

_MISPLACED: Final = {
    "str": "make a client of a URL: Agent(LLMClient('http://127.0.0.1:1234/v1'))",
    "Transport": "make a client of it: Agent(LLMClient(transport=transport))",
    "Agent": "pass the client of that agent, or use that agent itself, which serves any number of runs",
    "NoneType": "pass LLMClient(), which finds its server in the environment",
}


class ClientSource:
    """The client or the pool of an agent, and the context lengths of the models.

    Args:
        client: The client, or the pool that lends clients.
        timer: Returns seconds of a monotonic clock; replaced in tests.

    Raises:
        LLMValidationError: The object is neither a client nor a pool.

    Attributes:
        demanded_reasoning_fields: For each model whose server has demanded its reasoning, the field for it.
        image_places: For each model that cannot see images, or whose server has refused them in the usual place,
            where they are sent.
    """

    def __init__(self, client: ChatClient | ChatClientPool, *, timer: Callable[[], float] = time.monotonic) -> None:
        is_client, is_pool = hasattr(client, "chat_completion"), hasattr(client, "client")
        if isinstance(client, type) or is_blocking(client) or not (is_client or is_pool):
            raise LLMValidationError(
                f"client must be an LLMClient or an LLMClientPool, not {client!r}",
                hint=hint_for(client, _MISPLACED, "your own client needs the methods of lmbridge.ChatClient"),
            )
        self._client: Any = client
        self._is_pool = not is_client
        self._timer = timer
        self._context_lengths: dict[str | None, tuple[int | None, float]] = {}
        self.demanded_reasoning_fields: dict[str | None, str] = {}
        self.image_places: dict[str | None, ImagePlace] = {}
        self._locks: dict[str | None, asyncio.Lock] = {}

    @property
    def model(self) -> str | None:
        """The client's default model; None if the server, or the pool, chooses it."""
        return getattr(self._client, "model", None)

    def lease(self, model: str | None) -> AbstractAsyncContextManager[ChatClient]:
        """Lends a client for as long as the block is open."""
        if self._is_pool:
            return self._client.client(model)  # type: ignore[no-any-return]  # a ChatClientPool
        return nullcontext(self._client)

    async def context_length(self, model: str | None) -> int | None:
        """Returns how many tokens fit into the model's context, the answer included; None if the server does not say.

        The server is asked once for each model. If it did not say, because the model was not loaded or the server was
        busy, it is asked again after a minute. An error of this request is only logged: the generation that follows
        meets the same problem, and reports it.
        """
        if not self._is_known(model):
            async with self._locks.setdefault(model, asyncio.Lock()):
                if not self._is_known(model):
                    self._context_lengths[model] = await self._request_context_length(model), self._timer()
        return self._context_lengths[model][0]

    def _is_known(self, model: str | None) -> bool:
        context_length, requested_at = self._context_lengths.get(model, (None, -math.inf))
        return context_length is not None or self._timer() - requested_at < _ASK_AGAIN_SECONDS

    async def _request_context_length(self, model: str | None) -> int | None:
        try:
            async with asyncio.timeout(_DISCOVERY_SECONDS), self.lease(model) as client:
                if not isinstance(client, ReportsServerInfo):
                    return None
                info = await client.server_info()
                if _is_blind(info, model):
                    self.image_places[model] = "none"
                return _context_length_in(info, model)
        except (LLMError, TimeoutError) as error:
            logger.debug("the context length of model %r is unknown: %s", model, error)
            return None

    def __repr__(self) -> str:
        return repr(self._client)


def _is_blind(info: ServerInfo, model: str | None) -> bool:
    """Returns whether the server says that the model cannot see images; without a name, that no model can."""
    named = [each for each in info.models if model is None or is_same_model(model, each.id)]
    return bool(named) and all(each.vision is False for each in named)


def _context_length_in(info: ServerInfo, model: str | None) -> int | None:
    named = [each for each in info.models if model is not None and is_same_model(model, each.id)]
    for each in named:
        if each.context_length is not None:
            return each.context_length
    # The context length of a loaded model says nothing about a model that is not loaded yet.
    return None if any(each.loaded is False for each in named) else info.context_length
