"""Headers that change while a server on HTTP is used: those that a function or command returns, and OAuth tokens.

Both kinds are implemented as an `Auth` of the HTTP client. All requests of a connection, streams included, pass through
its `Auth`, which can send a request again with new headers after the first response was a 401.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Final

from lmbridge.mcp.config.server_spec import ClientCredentials, ServerSpec
from lmbridge.mcp.sdk.session_errors import RequestRejectedError

FetchHeaders = Callable[[], Awaitable[Mapping[str, str]]]
"""Returns the current headers of a server. It raises `RequestRejectedError` if they cannot be fetched."""

_REFUSED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


def make_auth(httpx: Any, spec: ServerSpec, fetch_headers: FetchHeaders | None) -> Any:
    """Returns the `Auth` of the HTTP client for a server, or None if it needs none.

    Args:
        httpx: The module of the HTTP client.
        spec: The server.
        fetch_headers: Returns the current values of headers that change over time; None if the server has none.
    """
    if fetch_headers is not None:
        return _as_auth(httpx, _RefreshedHeaders(fetch_headers).flow)
    if spec.client_credentials is not None:
        return _as_auth(httpx, _ClientCredentialsFlow(spec, spec.client_credentials).flow)
    return None


def _as_auth(httpx: Any, flow: Callable[[Any], AsyncGenerator[Any, Any]]) -> Any:
    class Auth(httpx.Auth):  # type: ignore[misc]  # the module is httpx or httpx2
        def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
            return flow(request)

    return Auth()


class _RefreshedHeaders:
    """Adds the headers that a function returns. The function is called for the first request, and again after a 401."""

    def __init__(self, fetch: FetchHeaders) -> None:
        self._fetch = fetch
        self._headers: Mapping[str, str] = {}
        self._version = self._refused_version = 0
        self._lock = asyncio.Lock()

    async def flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        version = await self._refresh(0)
        request.headers.update(self._headers)
        response = yield request
        # If the server refuses headers that have just been fetched, further requests do not fetch them again.
        if response.status_code == HTTPStatus.UNAUTHORIZED and version != self._refused_version:
            version = await self._refresh(version)
            request.headers.update(self._headers)
            response = yield request
            if response.status_code == HTTPStatus.UNAUTHORIZED:
                self._refused_version = version

    async def _refresh(self, seen: int) -> int:
        """Fetches the headers, unless another request has done so since version `seen`. Returns the current version."""
        async with self._lock:
            if self._version == seen:
                self._headers = await self._fetch()
                self._version += 1
            return self._version


class _ClientCredentialsFlow:
    """Gets a token through the SDK's own implementation of OAuth's grant "client_credentials", and sends it.

    The SDK's provider holds a lock while a request waits for its answer, so a call of one minute would delay all other
    calls. Therefore requests do not pass through the provider. It gets only the refusals, one at a time, and returns a
    token.
    """

    def __init__(self, spec: ServerSpec, credentials: ClientCredentials) -> None:
        self._provider = _make_provider(spec, credentials)
        self._lock = asyncio.Lock()

    async def flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        token = self._add_token(request)
        response = yield request
        if response.status_code not in _REFUSED:
            return
        async with self._lock:
            if token == self._token:
                async with aclosing(self._get_token(request, response)) as requests:
                    asked = await anext(requests, None)
                    while asked is not None:
                        answer = yield asked
                        try:
                            asked = await requests.asend(answer)
                        except StopAsyncIteration:
                            break
        if self._add_token(request) not in (None, token):
            yield request

    async def _get_token(self, request: Any, refusal: Any) -> AsyncGenerator[Any, Any]:
        """Yields the requests that the provider sends until it has a token or gives up."""
        from mcp.client.auth import OAuthFlowError

        has_refusal = False
        async with aclosing(self._provider.async_auth_flow(request)) as requests:
            try:
                asked = await anext(requests)
                while True:
                    # The provider first sends the request itself, and gets the refusal that has arrived already.
                    if asked is not request:
                        answer = yield asked
                    elif has_refusal:
                        return
                    else:
                        answer, has_refusal = refusal, True
                    asked = await requests.asend(answer)
            except StopAsyncIteration:
                return
            except OAuthFlowError as exc:
                hint = 'check "clientCredentials" in the configuration: the id, the secret, the issuer and the scope'
                raise RequestRejectedError(f"could not get a token for it: {exc}", hint=hint) from exc

    @property
    def _token(self) -> str | None:
        context = self._provider.context
        return context.current_tokens.access_token if context.is_token_valid() else None

    def _add_token(self, request: Any) -> str | None:
        """Adds the token to a request, if there is one, and returns it."""
        if (token := self._token) is not None:
            request.headers["Authorization"] = f"Bearer {token}"
        return token


class _TokenStorage:
    """Keeps the token of a server in memory, for as long as the connection lasts."""

    def __init__(self, spec: ServerSpec) -> None:
        self._spec = spec
        self._tokens: Any = None

    async def get_tokens(self) -> Any:
        return self._tokens

    async def set_tokens(self, tokens: Any) -> None:
        self._spec.remember_secrets([tokens.access_token])
        self._tokens = tokens

    async def get_client_info(self) -> Any:
        """Returns None, because a client that the configuration names need not be registered."""
        return None

    async def set_client_info(self, client_info: Any) -> None:
        """Does nothing, because the client is never registered."""


def _make_provider(spec: ServerSpec, credentials: ClientCredentials) -> Any:
    from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider

    provider: Any = ClientCredentialsOAuthProvider
    names = inspect.signature(provider).parameters
    if "issuer" not in names:
        # Without the argument `issuer`, the server would decide who gets the secret.
        raise RequestRejectedError(
            "the installed version of mcp does not check who gets the client secret", hint="pip install -U mcp"
        )
    # In SDK 1.x, the argument is called `scopes`.
    scope = {"scope" if "scope" in names else "scopes": credentials.scope}
    return provider(
        spec.url,
        _TokenStorage(spec),
        credentials.client_id,
        credentials.client_secret,
        issuer=credentials.issuer,
        **scope,
    )
