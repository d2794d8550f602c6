"""The checks of `lmbridge doctor` that find out whether strangers can use a server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

from lmbridge.cli.connection import ServerConnection
from lmbridge.cli.findings import Finding
from lmbridge.client.discovery import KeylessTransport
from lmbridge.client.llm import LLMClient
from lmbridge.client.server_info import ServerKind
from lmbridge.config import Limits, is_loopback, socket_path_of
from lmbridge.errors import LLMError

_STRANGER: Final = "https://stranger.example"
"""The origin of a website that has nothing to do with the server."""
_DOCUMENTATION_ADDRESS: Final = "192.0.2.1"
"""An address that is reserved for documentation (RFC 5737). Nothing is sent to it."""
_PROBE_SECONDS: Final = 2.0

_CORS_FIXES: Final[dict[ServerKind, str]] = {
    "lmstudio": "switch CORS off in the settings of LM Studio's server, or require a key there",
    "llama.cpp": "start llama-server with --api-key",
    "ollama": "remove * from OLLAMA_ORIGINS",
    "vllm": "start vLLM with --allowed-origins or --api-key",
    "unknown": "require a key, or allow only the origins that you know",
}
_ADDRESS_FIXES: Final[dict[ServerKind, str]] = {
    "lmstudio": 'switch off "Serve on Local Network" in the settings of LM Studio\'s server, or require a key there',
    "llama.cpp": "start llama-server with --host 127.0.0.1, or with --api-key",
    "ollama": "set OLLAMA_HOST=127.0.0.1; Ollama has no keys, so put `lmbridge gateway` with a key in front of it",
    "vllm": "start vLLM with --host 127.0.0.1, or with --api-key",
    "unknown": "let the server listen on 127.0.0.1, or require a key",
}


async def check_websites(connection: ServerConnection) -> Finding:
    """Checks whether any website that is open in a browser may use the server (CORS)."""
    messages = [{"role": "user", "content": "Say hi."}]
    async with stranger(connection.client.api_base, connection.model) as client:
        try:
            raw = await client.with_raw_response.chat_completion(
                messages, max_tokens=1, extra_headers={"Origin": _STRANGER}
            )
        except LLMError as error:
            if error.status in (401, 403):
                return Finding("websites", "ok", "the server requires a key")
            raise
    allowed = raw.headers.get("Access-Control-Allow-Origin")
    if allowed in ("*", _STRANGER):
        what = "any website that you open can use this server (CORS allows every origin, and no key is required)"
        return Finding("websites", "warning", what, _CORS_FIXES[connection.info.kind])
    return Finding("websites", "ok", "websites cannot use the server")


async def check_network(connection: ServerConnection) -> Finding:
    """Checks whether other machines can use the server without a key."""
    api_base = connection.client.api_base
    if socket_path_of(api_base) is not None:
        return Finding("network", "ok", "the server listens on a socket of this machine")
    if not is_loopback(api_base):
        return Finding("network", "skipped", "the server is on another machine")
    address = await asyncio.to_thread(_own_address)
    if address is None:
        return Finding("network", "ok", "this machine has no network")
    parts = urlsplit(api_base)
    url = parts._replace(netloc=address if parts.port is None else f"{address}:{parts.port}").geturl()
    async with stranger(url, None) as client:
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                await client.list_models()
        except (LLMError, TimeoutError) as error:
            requires_key = isinstance(error, LLMError) and error.status in (401, 403)
            what = "other machines need a key" if requires_key else "other machines cannot reach the server"
            return Finding("network", "ok", what)
    what = f"every machine on the network can use the server without a key, at {url}"
    return Finding("network", "warning", what, _ADDRESS_FIXES[connection.info.kind])


@asynccontextmanager
async def stranger(api_base: str, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client that sends no key, and whose requests are scheduled separately from those of other clients."""
    async with KeylessTransport(api_base, limits=Limits()) as transport:
        yield LLMClient(model=model, max_retries=0, transport=transport)


def _own_address() -> str | None:
    """Returns the address of this machine in its network, or None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # For a datagram socket, this only chooses a route.
            probe.connect((_DOCUMENTATION_ADDRESS, 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address
