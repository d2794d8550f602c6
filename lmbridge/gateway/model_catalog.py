"""`ModelCatalog`: the models of the servers behind a gateway.

It answers `GET /v1/models` and `GET /v1/models/NAME`, and tells the status page which models the servers have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

from lmbridge.client.failures import classify
from lmbridge.client.json_codec import decode_json
from lmbridge.config import Timeouts
from lmbridge.errors import LLMError, LLMResponseError
from lmbridge.gateway.gateway_errors import Problem
from lmbridge.gateway.http_server import IncomingRequest
from lmbridge.gateway.passing_body import headers_for_client
from lmbridge.gateway.redaction import redacted_body
from lmbridge.transport import Interpreter, Request, Transport

logger: logging.Logger = logging.getLogger("lmbridge.gateway")

MODELS_PATH: Final = "/v1/models"
"""The path of the list of models. The entry of a model is at its name below this path."""
_LIST_SECONDS: Final = 10.0
"""How many seconds a server may take to list its models."""
_LIST_AGE: Final = 10.0
"""How old the list of models may become, in seconds, before the status page asks for it again."""


class ModelCatalog:
    """Lists the models of all servers, and remembers the last list of each server and whether the server answered.

    Args:
        servers: The transports of the servers.
        passes_credentials: Whether the key of a client is passed on to the servers.
    """

    def __init__(self, servers: Sequence[Transport], *, passes_credentials: bool) -> None:
        self._servers = servers
        self._passes_credentials = passes_credentials
        self._names: dict[Transport, tuple[str, ...]] = dict.fromkeys(servers, ())
        self._unreachable: set[Transport] = set()
        self._listed_at = -_LIST_AGE
        self._listing: asyncio.Task[None] | None = None
        self._is_closed = False

    def names(self, server: Transport) -> tuple[str, ...]:
        """Returns the models that a server listed most recently."""
        return self._names[server]

    def is_healthy(self, server: Transport) -> bool:
        """Returns whether a server answered when it was last asked for its models, or has not been asked yet.

        A refusal, such as one with status 401, is an answer.
        """
        return server not in self._unreachable

    async def answer_list(self, incoming: IncomingRequest) -> None:
        """Answers `GET /v1/models`. The answer of a single server is passed on byte for byte.

        There is one exception: if the server quotes one of the gateway's own keys in an error, the key is replaced.

        Raises:
            LLMError: No server answers.
            Problem: The only server answers with an error that cannot be read.
        """
        if len(self._servers) == 1:
            headers, server = self._client_credentials(incoming), self._servers[0]
            with self._noting_health(server):
                response = await server.forward(_list_request(headers))
            async with response:
                with self._noting_health(server):
                    body = response.whole_body or b"".join([part async for part in _parts(response.read)])
                if response.status == 200:
                    self._record(server, _entries_in(body))
                kept = [each for each in headers_for_client(response.headers) if each[0].lower() != "content-length"]
                if response.status >= 400:
                    kept, body = await redacted_body(response.status, kept, body, server.redact)
                await incoming.respond(response.status, kept, body)
            return
        await incoming.respond_json({"object": "list", "data": await self._list_models(incoming)})

    async def answer_entry(self, incoming: IncomingRequest) -> None:
        """Answers `GET /v1/models/NAME`.

        Raises:
            Problem: No server has the model.
            LLMError: No server answers.
        """
        name = unquote(incoming.path.removeprefix(f"{MODELS_PATH}/"))
        entry = next((each for each in await self._list_models(incoming) if each["id"] == name), None)
        if entry is None:
            hint = "GET /v1/models lists the models that there are"
            raise Problem(404, f"no server has the model {name[:200]!r}", code="model_not_found", hint=hint)
        await incoming.respond_json(entry)

    def refresh(self) -> None:
        """Asks the servers for their models, at most once in ten seconds, unless the catalog has been closed.

        It does not wait for the answers.
        """
        now = asyncio.get_running_loop().time()
        if self._listing is None and not self._is_closed and now - self._listed_at >= _LIST_AGE:
            self._listed_at = now
            self._listing = asyncio.get_running_loop().create_task(self._list_quietly())

    async def close(self) -> None:
        """Cancels the request for the models that `refresh` has started, if it is in flight, and waits for its end.

        After that, `refresh` does nothing.
        """
        # Nobody would wait for a request that begins later: the gateway still answers its status page while it closes.
        self._is_closed = True
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.wait({self._listing})

    async def _list_models(self, incoming: IncomingRequest | None) -> list[Mapping[str, Any]]:
        """Returns the models of all servers that answer, each once.

        Raises:
            LLMError: No server answers.
        """
        headers = {} if incoming is None else self._client_credentials(incoming)
        lists = await asyncio.gather(*(self._ask_for_models(each, headers) for each in self._servers))
        if errors := [each for each in lists if isinstance(each, LLMError)]:
            if len(errors) == len(lists):
                raise errors[0]
            logger.warning("a server did not list its models: %s", errors[0])
        merged: dict[str, Mapping[str, Any]] = {}
        for entries in lists:
            for entry in entries if not isinstance(entries, LLMError) else []:
                merged.setdefault(entry["id"], entry)
        return list(merged.values())

    async def _ask_for_models(
        self, server: Transport, headers: Mapping[str, str]
    ) -> list[Mapping[str, Any]] | LLMError:
        try:
            with self._noting_health(server):
                reply = await server.request(_list_request(headers))
        except LLMError as error:
            return error
        if reply.status != 200:
            return LLMError(f"{server.api_base} answered {reply.status} when it was asked for its models")
        entries = _entries_in(reply.body)
        self._record(server, entries)
        return entries

    def _client_credentials(self, incoming: IncomingRequest) -> dict[str, str]:
        if not self._passes_credentials:
            return {}
        return {name: incoming.headers[name] for name in ("Authorization", "X-Api-Key") if name in incoming.headers}

    async def _list_quietly(self) -> None:
        try:
            with contextlib.suppress(LLMError):
                await self._list_models(None)
        finally:
            self._listing = None

    def _record(self, server: Transport, entries: Sequence[Mapping[str, Any]]) -> None:
        self._names[server] = tuple(entry["id"] for entry in entries)

    @contextlib.contextmanager
    def _noting_health(self, server: Transport) -> Iterator[None]:
        """Remembers whether the server answers the request in the block. A refusal is an answer, too."""
        try:
            yield
        except LLMResponseError:
            self._unreachable.discard(server)
            raise
        except LLMError:
            self._unreachable.add(server)
            raise
        self._unreachable.discard(server)


def _list_request(headers: Mapping[str, str]) -> Request:
    return Request(
        operation="model list",
        method="GET",
        path="/models",
        interpreter=Interpreter(classify=classify),
        timeouts=Timeouts(first_byte=_LIST_SECONDS),
        max_retries=0,
        queued=False,
        # The gateway not only passes the list on but also reads it, so it must not be compressed.
        headers={**headers, "Accept-Encoding": "identity"},
    )


async def _parts(read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    while part := await read():
        yield part


def _entries_in(body: bytes) -> list[Mapping[str, Any]]:
    """Returns the entries of a list of models. Items that are not objects with a name are left out."""
    try:
        value = decode_json(body)
    except ValueError:
        return []
    entries = value.get("data") if isinstance(value, Mapping) else None
    if not isinstance(entries, list):
        return []
    return [each for each in entries if isinstance(each, Mapping) and isinstance(each.get("id"), str)]
