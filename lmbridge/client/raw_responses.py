"""`client.with_raw_response`: replies with the status and the headers of their HTTP response.

A reply is a plain dict, which has no place for headers. The alternative was an observer that sees every response, but
then the caller would have to find out which response belongs to which call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack, cast, overload

import attrs

from lmbridge._copying import NotCopyable
from lmbridge._pending_call import explains_missing_await
from lmbridge.client.params import ChatParams, EmbeddingsParams, ResponseParams, TextParams, shows_params
from lmbridge.errors import LLMValidationError

if TYPE_CHECKING:
    from lmbridge.client.input_checks import Texts
    from lmbridge.client.llm import LLMClient
    from lmbridge.client.responses import ResponseInput
    from lmbridge.types import ChatCompletion, Embeddings, Response, TextCompletion

_Reply = TypeVar("_Reply")


@attrs.frozen(kw_only=True)
class RawResponse(Generic[_Reply]):
    """A reply with the status and headers of its HTTP response."""

    parsed: _Reply
    """The reply, as the method of the client returns it."""
    status: int
    """The HTTP status code."""
    headers: Mapping[str, str] = attrs.field(repr=False)
    """The headers of the response. Their names are case-insensitive."""


class RawResponses(NotCopyable):
    """The methods of a client, as `client.with_raw_response`: each returns a `RawResponse`.

    The parameters and the errors are those of the client's methods. Streams have `status` and `headers` themselves.
    """

    _instead_of_a_copy = "use the with_raw_response of each client"

    def __init__(self, client: LLMClient) -> None:
        self._client = client

    @overload
    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **params: Unpack[ChatParams]
    ) -> RawResponse[ChatCompletion]: ...

    @overload
    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **params: Any
    ) -> RawResponse[ChatCompletion]: ...

    @shows_params(ChatParams)
    @explains_missing_await
    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **params: Any
    ) -> RawResponse[ChatCompletion]:
        """Asks for the next message of a chat, as `LLMClient.chat_completion` does."""
        _refuse_stream(params)
        return await self._record(lambda client: client.chat_completion(messages, model=model, **params))

    @overload
    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, **params: Unpack[TextParams]
    ) -> RawResponse[TextCompletion]: ...

    @overload
    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, **params: Any
    ) -> RawResponse[TextCompletion]: ...

    @shows_params(TextParams)
    @explains_missing_await
    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, **params: Any
    ) -> RawResponse[TextCompletion]:
        """Asks for the continuation of a text, as `LLMClient.text_completion` does."""
        _refuse_stream(params)
        return await self._record(lambda client: client.text_completion(prompt, model=model, **params))

    @overload
    async def embeddings(
        self,
        input: Texts,
        *,
        model: str | None = None,
        batch_size: int | None = None,
        **params: Unpack[EmbeddingsParams],
    ) -> RawResponse[Embeddings]: ...

    @overload
    async def embeddings(
        self, input: Texts, *, model: str | None = None, batch_size: int | None = None, **params: Any
    ) -> RawResponse[Embeddings]: ...

    @shows_params(EmbeddingsParams)
    @explains_missing_await
    async def embeddings(
        self,
        input: Texts,  # noqa: A002 - the API's own name
        *,
        model: str | None = None,
        batch_size: int | None = None,
        **params: Any,
    ) -> RawResponse[Embeddings]:
        """Asks for embeddings, as `LLMClient.embeddings` does.

        With `batch_size`, the status and headers are those of the last request.
        """
        return await self._record(lambda client: client.embeddings(input, model=model, batch_size=batch_size, **params))

    @overload
    async def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        **params: Unpack[ResponseParams],
    ) -> RawResponse[Response]: ...

    @overload
    async def create_response(
        self, input: ResponseInput, *, model: str | None = None, previous_response_id: str | None = None, **params: Any
    ) -> RawResponse[Response]: ...

    @shows_params(ResponseParams)
    @explains_missing_await
    async def create_response(
        self,
        input: ResponseInput,  # noqa: A002 - the API's own name
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        **params: Any,
    ) -> RawResponse[Response]:
        """Asks for a response, as `LLMClient.create_response` does."""
        _refuse_stream(params)
        return await self._record(
            lambda client: client.create_response(
                input, model=model, previous_response_id=previous_response_id, **params
            )
        )

    async def _record(self, send: Callable[[LLMClient], Awaitable[Any]]) -> RawResponse[Any]:
        heads: list[tuple[int, Mapping[str, str]]] = []
        client = self._client.with_options()
        client._server.on_response = lambda status, headers: heads.append((status, headers))  # noqa: SLF001 - its own copy
        parsed = await send(client)
        status, headers = heads[-1]
        return RawResponse(parsed=cast("Any", parsed), status=status, headers=headers)


def _refuse_stream(params: Mapping[str, Any]) -> None:
    if params.get("stream"):
        raise LLMValidationError(
            "with_raw_response does not return streams",
            hint="call the client's own method: a stream has .status and .headers",
        )
