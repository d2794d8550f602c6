"""A client of openai-python whose requests go through an `LLMClient`.

Many frameworks already translate their messages, tools and outputs for openai-python, and handle its errors. To reuse
that code, the transport below openai-python is replaced by one that hands each request to the `LLMClient`. The
schedule, retries, time limits and checks of the client apply, and its errors are raised as those of openai-python.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

try:
    import httpx2
    import openai
except ImportError as _error:
    raise ImportError(
        "lmbridge.interop.openai needs openai 3.31 or newer: pip install 'openai>=3.31', or the extra of the framework,"
        " such as pip install 'lmbridge[pydantic-ai]'"
    ) from _error

from lmbridge.client import LLMClient
from lmbridge.client.chat_stream import ChatStream
from lmbridge.errors import (
    ContextLengthExceededError,
    LLMAuthenticationError,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
)

__all__ = ["openai_client"]

_STATUS_ERRORS: Final[Mapping[int, type[openai.APIStatusError]]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}
_STATUSES: Final[tuple[tuple[type[LLMError], int, str | None], ...]] = (
    (ContextLengthExceededError, 400, "context_length_exceeded"),
    (ModelNotFoundError, 404, "model_not_found"),
    (LLMAuthenticationError, 401, "invalid_api_key"),
    (LLMRateLimitError, 429, "rate_limit_exceeded"),
    (ModelLoadError, 503, None),
    (LLMResponseError, 502, None),
)
"""The status and the code by which openai-python and the frameworks recognize an error. This status is used only if the
server reported the error without an error status, for example inside a stream."""
_OWN_HEADERS: Final = re.compile(
    "accept|accept-encoding|authorization|connection|content-.*|host|user-agent|openai-.*|x-stainless-.*"
)
"""Headers that openai-python sends by itself. The `LLMClient` sends its own."""


def openai_client(client: LLMClient) -> openai.AsyncOpenAI:
    """Returns a client of openai-python that sends chat completions through an `LLMClient`.

    ::

        async with LLMClient() as client:
            completion = await openai_client(client).chat.completions.create(model="qwen3-4b", messages=messages)

    Model scheduling, retries, timeouts, `model_mismatch` and observers are those of the `LLMClient`. A `timeout=` of a
    call is passed to `LLMClient.chat_completion`, so it limits each wait and not the whole call. Errors are those of
    openai-python; `__cause__` is the `LLMError`, with its `partial`. Any request other than a chat completion raises an
    `LLMValidationError`. The returned client need not be closed; close the `LLMClient`.

    Args:
        client: The client that makes the requests.
    """
    base_url = client.api_base.partition(",")[0]
    transport = httpx2.AsyncClient(transport=_ClientTransport(client))
    # The key is never sent. With `timeout=None`, the time limit of a request comes from the call, not from a default.
    return openai.AsyncOpenAI(
        base_url=base_url, api_key="the key of the LLMClient", max_retries=0, timeout=None, http_client=transport
    )


class _ClientTransport(httpx2.AsyncBaseTransport):
    """Hands the requests of openai-python to an `LLMClient`."""

    def __init__(self, client: LLMClient) -> None:
        self._client: Final = client

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method != "POST" or not request.url.path.endswith("/chat/completions"):
            text = f"{request.method} {request.url.path} is not a chat completion"
            raise LLMValidationError(text, hint="use the LLMClient itself for other requests")
        body: dict[str, Any] = json.loads(await request.aread())
        try:
            reply = await self._client.chat_completion(
                body.pop("messages"), model=body.pop("model", None) or None, **body, **_options(request)
            )
        except LLMError as error:
            raise as_openai_error(error, request) from error
        if isinstance(reply, ChatStream):
            headers = {"Content-Type": "text/event-stream"}
            return httpx2.Response(200, headers=headers, stream=_Events(reply, request), request=request)
        return httpx2.Response(200, json=reply, request=request)


class _Events(httpx2.AsyncByteStream):
    """The chunks of a stream, as the bytes of an event stream."""

    def __init__(self, chunks: ChatStream, request: httpx2.Request) -> None:
        self._chunks: Final = chunks
        self._request: Final = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield f"data: {json.dumps(chunk)}\n\n".encode()
        except LLMError as error:
            raise as_openai_error(error, self._request) from error
        yield b"data: [DONE]\n\n"

    async def aclose(self) -> None:
        await self._chunks.aclose()


def _options(request: httpx2.Request) -> dict[str, Any]:
    """Returns the options of `LLMClient.chat_completion` for what the framework has added to a request."""
    headers = {name: value for name, value in request.headers.items() if not _OWN_HEADERS.fullmatch(name)}
    options: dict[str, Any] = {"extra_headers": headers, "extra_query": dict(request.url.params)}
    timeout = request.extensions.get("timeout", {}).get("read")
    return options if timeout is None else {**options, "timeout": float(timeout)}


def as_openai_error(error: LLMError, request: httpx2.Request) -> Exception:
    """Returns the error of openai-python for one of lmbridge.

    A plain `LLMValidationError`, such as lmbridge raises before anything is sent, is returned unchanged.
    """
    if isinstance(error, LLMTimeoutError):
        return openai.APITimeoutError(request)
    if isinstance(error, LLMConnectionError | LLMStreamError):
        return openai.APIConnectionError(message=str(error), request=request)
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            reported = error.status or 0
            return _status_error(error, reported if reported >= 400 else status, code, request)
    if isinstance(error, LLMValidationError) and not isinstance(error, ModelMismatchError):
        return error
    return openai.APIError(str(error), request, body=None)


def _status_error(error: LLMError, status: int, code: str | None, request: httpx2.Request) -> openai.APIStatusError:
    kind = _STATUS_ERRORS.get(status, openai.InternalServerError if status >= 500 else openai.APIStatusError)
    body = {"message": str(error), "type": type(error).__name__, "code": code, "param": None}
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    response = httpx2.Response(status, headers=headers, json={"error": body}, request=request)
    return kind(str(error), response=response, body=body)
