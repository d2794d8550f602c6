"""`discover`: finds the model servers that run on this machine.

Local servers do not register anywhere, so the ports on which they listen by default are tried. Each answer is judged by
its body, because any program may listen there: port 8000 is also that of Django, and 8080 that of many proxies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import attrs

from lmbridge._checks import check_integer, check_seconds, invalid_argument
from lmbridge._tasks import run_together
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.json_codec import decode_json
from lmbridge.client.served_model import MismatchPolicy
from lmbridge.client.server_info import ServerInfo, describe
from lmbridge.config import Limits, Timeouts
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.transport import Transport

DEFAULT_PORTS: Final = (1234, 9931, 8080, 11434, 8000)
"""The ports on which servers listen by default: LM Studio, llama.cpp (9931, and 8080 before it moved, see
https://github.com/ggml-org/llama.cpp/pull/26508), Ollama, vLLM."""
_PORTS_HINT: Final = "for example ports=[1234, 9931]"
_NOT_READY: Final = (401, 403, 503)
"""The statuses with which a model server refuses to describe itself: it requires a key, or is loading its model."""


@attrs.frozen(kw_only=True)
class FoundServer:
    """A model server that `discover` has found on this machine."""

    api_base: str
    """The URL for `LLMClient`, such as "http://127.0.0.1:1234/v1"."""
    info: ServerInfo
    """What the server reports about itself. If it has reported nothing, `kind` is "unknown", and `error` says why."""
    error: LLMError | None = None
    """Why the server did not describe itself: it requires a key (`LLMAuthenticationError`), or is loading its model.
    None, the default, means that it did."""


class KeylessTransport(Transport):
    """A transport that never sends the key of the environment.

    The key belongs to one server, and whatever listens on a common port need not be that server.
    """

    def default_key(self) -> str | None:
        """Returns None: no key is sent."""
        return None


async def discover(ports: Iterable[int] = DEFAULT_PORTS, timeout: float = 0.5) -> list[FoundServer]:
    """Returns the model servers that run on this machine, in the order of the ports.

    All ports are tried at the same time, on the address 127.0.0.1. Programs that are not model servers are left out. No
    key is sent, because any program may listen on these ports; a server that requires a key is listed with an `error`.
    For example::

        for server in await lmbridge.discover():
            print(server.api_base, server.info.kind, server.info.loaded_models)

    Args:
        ports: The ports to try. Default: those of LM Studio (1234), llama.cpp (9931, and 8080 for older versions),
            Ollama (11434) and vLLM (8000).
        timeout: How many seconds a server may take to describe itself. Default: half a second.

    Raises:
        LLMValidationError: An argument is not valid.
    """
    check_seconds("timeout", timeout, optional=False)
    checked = _check_ports(ports)
    found = await run_together(_look(port, timeout) for port in checked)
    return [server for server in found if server is not None]


def _check_ports(ports: Any) -> list[int]:
    if isinstance(ports, str | bytes) or not isinstance(ports, Iterable):
        raise invalid_argument("ports", "a list of integers from 1 to 65535", ports, _PORTS_HINT)
    listed = list(ports)
    if not listed:
        raise LLMValidationError("ports is empty", hint=_PORTS_HINT)
    for port in listed:
        check_integer("ports", port, maximum=65535, hint=_PORTS_HINT)
    return list(dict.fromkeys(listed))


async def _look(port: int, timeout: float) -> FoundServer | None:
    """Returns the model server that listens on a port, or None."""
    url = f"http://127.0.0.1:{port}/v1"
    # A server that is loading its model says so at once, and `discover` does not wait for it.
    timeouts = Timeouts(connect=timeout, load=1e-9, first_byte=timeout, idle=timeout)
    async with KeylessTransport(url, limits=Limits()) as transport:
        server = ServerApi(
            transport,
            make_transport=None,
            timeouts=timeouts,
            max_retries=0,
            mismatch_policy=MismatchPolicy("ignore"),
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                try:
                    return FoundServer(api_base=url, info=await describe(server, None))
                except LLMError as error:
                    if _is_model_server(error):
                        return FoundServer(api_base=url, info=ServerInfo(kind="unknown"), error=error)
    return None


def _is_model_server(error: LLMError) -> bool:
    """Returns whether a refusal is that of a model server: a JSON object with an error."""
    if error.status not in _NOT_READY or error.body is None:
        return False
    try:
        value = decode_json(error.body.encode())
    except ValueError:
        return False
    return isinstance(value, dict) and bool(value.get("error"))
