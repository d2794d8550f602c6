"""Where generations come from: a client, or a pool that lends one for each."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Protocol

from lmbridge.client.names import is_same_model
from lmbridge.errors import LLMError, LLMValidationError

if TYPE_CHECKING:
    from lmbridge.client.server_info import ServerInfo

logger = logging.getLogger("lmbridge.agent")

_DISCOVERY: Final = 5.0
"""Seconds that the question for the context length may take."""
_AGAIN: Final = 60.0
"""Seconds after which it is asked again, if nobody knew."""
_TELLING: Final = 2_000
"""Bytes from which on a prompt says how many tokens a byte has: in a short one the template's own are too many."""


class ChatClient(Protocol):
    """What a run needs of a client: `LLMClient` has it. `server_info` may be there as well."""

    @property
    def model(self) -> str | None:
        """The model asked for where a call names none."""
        ...

    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None, stream: Any, **params: Any
    ) -> Any:
        """A stream of the chunks of the next message."""
        ...


class ChatPool(Protocol):
    """What lends clients: `LLMClientPool` does."""

    def client(self, model: str | None = None) -> AbstractAsyncContextManager[ChatClient]:
        """Lends a client."""
        ...


class Source:
    """A client or a pool, and what is known of the models there.

    Args:
        client: It.
        timer: Seconds, for when to ask again.

    Raises:
        LLMValidationError: it is neither.
    """

    def __init__(self, client: ChatClient | ChatPool, *, timer: Callable[[], float] = time.monotonic) -> None:
        is_client, is_pool = hasattr(client, "chat_completion"), hasattr(client, "client")
        if isinstance(client, type) or not (is_client or is_pool):
            raise LLMValidationError(f"client is {client!r}", hint="give an LLMClient or an LLMClientPool")
        self._client: Any = client
        self._is_pool = not is_client
        self._timer = timer
        self._contexts: dict[str | None, tuple[int | None, float]] = {}
        self._asking: dict[str | None, asyncio.Lock] = {}

    @property
    def model(self) -> str | None:
        """The model asked for where nobody names one; None if the server, or the pool, chooses."""
        return getattr(self._client, "model", None)

    def lease(self, model: str | None) -> AbstractAsyncContextManager[ChatClient]:
        """A client, for as long as the block goes on."""
        if self._is_pool:
            return self._client.client(model)  # type: ignore[no-any-return]  # as its Protocol says
        return nullcontext(self._client)

    async def context_length(self, model: str | None) -> int | None:
        """Tokens that a request to the model may need, the answer included; None if the server does not tell.

        The server is asked once for each model; if it did not tell, because the model was not loaded or the server
        busy, again after a minute. What goes wrong then is left to the generation to tell.
        """
        if not self._is_known(model):
            async with self._asking.setdefault(model, asyncio.Lock()):
                if not self._is_known(model):
                    self._contexts[model] = await self._ask(model), self._timer()
        return self._contexts[model][0]

    def _is_known(self, model: str | None) -> bool:
        context, asked = self._contexts.get(model, (None, -math.inf))
        return context is not None or self._timer() - asked < _AGAIN

    async def _ask(self, model: str | None) -> int | None:
        try:
            async with asyncio.timeout(_DISCOVERY), self.lease(model) as client:
                ask = getattr(client, "server_info", None)
                return None if ask is None else _context_of(await ask(), model)
        except (LLMError, TimeoutError) as error:
            logger.debug("the context length of model %r is unknown: %s", model, error)
            return None

    def __repr__(self) -> str:
        return repr(self._client)


def _context_of(info: ServerInfo, model: str | None) -> int | None:
    named = [each for each in info.models if model is not None and is_same_model(model, each.id)]
    for each in named:
        if each.context_length is not None:
            return each.context_length
    # Of a model that is not loaded yet, those that are say nothing.
    return None if any(each.loaded is False for each in named) else info.context_length


class TokenEstimate:
    """How many tokens a prompt has: what the server counted last, and a guess for what came since.

    A token is taken for three bytes of JSON: a little more than most English text and code needs, and about right for
    a Chinese character.
    """

    def __init__(self) -> None:
        self._known_size = 0
        self._known_tokens = 0
        self._per_byte = 1 / 3

    def tokens(self, size: int) -> int:
        """The tokens of a prompt.

        Args:
            size: Its bytes as JSON, tools included.
        """
        return max(0, self._known_tokens + round((size - self._known_size) * self._per_byte))

    def size(self, tokens: int) -> int:
        """The bytes that so many tokens of a prompt take."""
        return round(tokens / self._per_byte)

    def learn(self, size: int, tokens: int | None) -> None:
        """Notes what the server counted for a prompt of this size."""
        if tokens and size:
            self._known_size, self._known_tokens = size, tokens
            if size > _TELLING:
                self._per_byte = min(max(tokens / size, 1 / 8), 2.0)
