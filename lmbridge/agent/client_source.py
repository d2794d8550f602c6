"""`ClientSource`: lends a client for each generation, and remembers what is known about the server and its models."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from lmbridge._checks import hint_for, is_blocking
from lmbridge.agent.chat_client import ChatClient, ChatClientPool, CountsTokens, EmbedsTexts, ReportsServerInfo
from lmbridge.agent.result_images import ImagePlace
from lmbridge.client.served_model import is_same_model
from lmbridge.client.server_info import awaits_load, context_length_of
from lmbridge.errors import LLMError, LLMValidationError

if TYPE_CHECKING:
    from lmbridge.client.server_info import ServerInfo

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_DISCOVERY_SECONDS: Final = 5.0
"""The time limit of a request for the context length, in seconds."""
_COUNT_SECONDS: Final = 5.0
"""The time limit of a request for the tokens of a prompt, in seconds."""
_ASK_AGAIN_SECONDS: Final = 60.0
"""Seconds after which an unknown context length is requested again."""

_MISPLACED: Final = {
    "str": "make a client of a URL: Agent(LLMClient('http://127.0.0.1:1234/v1'))",
    "Transport": "make a client of it: Agent(LLMClient(transport=transport))",
    "Agent": "pass the client of that agent, or use that agent itself, which serves any number of runs",
    "NoneType": "pass LLMClient(), which finds its server in the environment",
}


class ClientSource:
    """The client or the pool of an agent, and what the agent has learned about the server and its models.

    Args:
        client: The client, or the pool that lends clients.
        timer: A monotonic clock that returns seconds. Tests replace it.

    Raises:
        LLMValidationError: The object is neither a client nor a pool.

    Attributes:
        demanded_reasoning_fields: For each model whose server has demanded its reasoning, the field of a message in
            which the reasoning is sent.
        embeddings: The embeddings of the definitions of tools, by the embedding model and the text.
        models_without_schemas: The models whose server refuses to constrain a reply to the schema of a tool.
        image_places: The `ImagePlace` for each model that cannot see images, and for each model whose server has
            refused images in a user message.
        server_kinds: For each model, the kind of its server, if the server has been asked.
        text_callers: The models that have written calls as text, which their server did not recognize.
        unloaded_models: The models that were not loaded when their server was asked.
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
        self.embeddings: dict[tuple[str, str], array[float]] = {}
        self.models_without_schemas: set[str | None] = set()
        self.image_places: dict[str | None, ImagePlace] = {}
        self._cannot_count: set[str | None] = set()
        self.server_kinds: dict[str | None, str] = {}
        self.text_callers: set[str | None] = set()
        self.unloaded_models: set[str | None] = set()
        self._models_awaiting_load: set[str | None] = set()
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

    def check_embeds(self) -> None:
        """Checks that the client can embed texts. The clients of a pool are checked when they are used.

        Raises:
            LLMValidationError: The client cannot embed texts.
        """
        if not (self._is_pool or isinstance(self._client, EmbedsTexts)):
            raise LLMValidationError(
                f"embedding_model needs a client with a method embeddings(), not {self._client!r}",
                hint="use an LLMClient, or leave embedding_model out",
            )

    async def context_length(self, model: str | None) -> int | None:
        """Returns how many tokens fit into the model's context, the answer included; None if the server does not say.

        The server is asked once for each model. If it did not say, because the model was not loaded or the server was
        busy, it is asked again after a minute. An `LLMError` or a `TimeoutError` of this request is only logged: the
        generation that follows meets the same problem, and reports it. Any other exception is raised, because it is a
        mistake in a client of the user.
        """
        if not self._is_known(model):
            async with self._locks.setdefault(model, asyncio.Lock()):
                if not self._is_known(model):
                    self._context_lengths[model] = await self._request_context_length(model), self._timer()
        return self._context_lengths[model][0]

    async def context_length_after_reply(self, model: str | None) -> int | None:
        """Returns the context length of a model that has just replied; None if it is unknown.

        If the model was not loaded when its server was asked, the server is asked once more, because it has loaded the
        model for the reply. If it has unloaded the model again, it is asked only after a minute.
        """
        if model in self._models_awaiting_load:
            async with self._locks.setdefault(model, asyncio.Lock()):
                if model in self._models_awaiting_load:
                    self._context_lengths[model] = await self._request_context_length(model), self._timer()
                    self._models_awaiting_load.discard(model)
        return self._context_lengths.get(model, (None, -math.inf))[0]

    async def count_tokens(
        self, model: str | None, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> int | None:
        """Returns how many tokens a prompt has, or None if the server cannot count them exactly.

        A server that cannot count exactly is not asked again for this model. As in `context_length`, an `LLMError` or a
        `TimeoutError` is only logged, and any other exception is raised.
        """
        if model in self._cannot_count:
            return None
        try:
            async with asyncio.timeout(_COUNT_SECONDS), self.lease(model) as client:
                if isinstance(client, CountsTokens):
                    count = await client.count_tokens(messages, model=model, tools=tools)
                    if count.exact:
                        return count.tokens
        except (LLMError, TimeoutError) as error:
            logger.debug("the tokens of a prompt for model %r are not known exactly: %s", model, error)
            return None
        self._cannot_count.add(model)
        return None

    def _is_known(self, model: str | None) -> bool:
        context_length, requested_at = self._context_lengths.get(model, (None, -math.inf))
        return context_length is not None or self._timer() - requested_at < _ASK_AGAIN_SECONDS

    async def _request_context_length(self, model: str | None) -> int | None:
        try:
            async with asyncio.timeout(_DISCOVERY_SECONDS), self.lease(model) as client:
                if not isinstance(client, ReportsServerInfo):
                    return None
                info = await client.server_info()
                self.server_kinds[model] = info.kind
                named = [each for each in info.models if model is not None and is_same_model(model, each.id)]
                if named and all(each.loaded is False for each in named):
                    self.unloaded_models.add(model)
                if _is_blind(info, model):
                    self.image_places[model] = "none"
                length = context_length_of(info, model)
                if length is None and awaits_load(info, model):
                    self._models_awaiting_load.add(model)
                return length
        except (LLMError, TimeoutError) as error:
            logger.debug("the context length of model %r is unknown: %s", model, error)
            return None

    def __repr__(self) -> str:
        return repr(self._client)


def _is_blind(info: ServerInfo, model: str | None) -> bool:
    """Returns whether the server says that a model, or each of its models if none is named, cannot see images."""
    named = [each for each in info.models if model is None or is_same_model(model, each.id)]
    return bool(named) and all(each.vision is False for each in named)
