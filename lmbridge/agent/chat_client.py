"""The Protocols that a client or a pool must satisfy for an agent to use it.

The alternative was that an agent depends on `LLMClient` itself. Protocols won because a run needs only one of its
methods, and because an agent can then use another SDK, a cache, a recording, or a double in a test. `LLMClient` and
`LLMClientPool` satisfy them without inheriting from them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lmbridge.client.server_info import ServerInfo
    from lmbridge.client.token_count import TokenCount


class ChunkStream(Protocol):
    """The chunks of one chat completion, as an OpenAI-compatible server sends them.

    Each chunk is a dict with `choices`, whose first entry has a `delta`. `ChatStream` satisfies this Protocol, and so
    does an async generator of dicts.
    """

    def __aiter__(self) -> AsyncIterator[Mapping[str, Any]]:
        """Returns the iterator over the chunks, which raises the error if the reply breaks off."""
        ...

    def aclose(self) -> Coroutine[Any, Any, None]:
        """Leaves the stream before its end, so that the server stops generating. It must be idempotent."""
        ...


class ChatClient(Protocol):
    """A client that an agent can use, such as `LLMClient`.

    A client that also has `server_info()` (see `ReportsServerInfo`) is asked for the context length of its models. If
    it has `count_tokens()` (see `CountsTokens`), it is asked for the size of a prompt that nearly fills the context.
    """

    @property
    def model(self) -> str | None:
        """The model for runs that do not name one, or None if the server chooses it."""
        ...

    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None, stream: Literal[True], **params: Any
    ) -> ChunkStream:
        """Requests the next message of a conversation, and returns its chunks.

        Args:
            messages: The conversation. The client may change the list, but not the messages in it.
            model: The model of the run, or None for the client's default.
            stream: Always True: only a stream makes a server notice that its client has left.
            **params: Further fields of the request, such as `max_tokens`, `stream_options`, `tools`, `response_format`
                and the sampling options of the agent.
        """
        ...


class ChatClientPool(Protocol):
    """A pool that lends clients to an agent, such as `LLMClientPool`."""

    def client(self, model: str | None = None) -> AbstractAsyncContextManager[ChatClient]:
        """Lends a client for as long as the block is open. An agent opens one block for each generation."""
        ...


@runtime_checkable
class ReportsServerInfo(Protocol):
    """A client that can describe its server and the models on it."""

    async def server_info(self) -> ServerInfo:
        """Returns what is known of the server and its models."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """A client that can count the tokens of a prompt."""

    async def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> TokenCount:
        """Returns how many tokens a prompt has, and whether the number is exact."""
        ...


@runtime_checkable
class EmbedsTexts(Protocol):
    """A client that can embed texts, which `Agent(embedding_model=...)` needs."""

    async def embeddings(self, input: Any, *, model: str | None = None) -> Mapping[str, Any]:  # noqa: A002 - as in the API
        """Returns the server's reply, whose `data` has an entry with an `embedding` for each text, in order."""
        ...
