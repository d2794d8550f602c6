"""`limits="auto"`: how much a server can do at a time, as it says itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal

import attrs

from lmbridge._checks import check_instance
from lmbridge.client.names import ModelNames
from lmbridge.client.server import Server
from lmbridge.config import Limits, Timeouts
from lmbridge.transport import Transport
from lmbridge.transport.http import FindLimits

if TYPE_CHECKING:
    from lmbridge.client.server_info import ServerInfo

SLOTS: Final = 4
"""Generations at a time where LM Studio or a llama.cpp router does not tell: the default of both."""


def limits_of(info: ServerInfo) -> Limits:
    """The limits for a server.

    LM Studio: the slots of its model, and as many models as are loaded, but at least one: it unloads one that it
    loaded on demand for the next (Auto-Evict, on by default; no API tells whether it is), even in mid-generation.
    llama.cpp: the slots of its model. Its router: the models that it holds at a time, and the slots of them all.
    Any other server: `Limits()`. Ollama and vLLM queue by themselves, and end what they have begun.
    """
    slots = info.slots or SLOTS
    if info.kind == "lmstudio":
        loaded = [model for model in info.models if model.loaded and not model.embeds]
        return Limits(max_concurrency=slots * max(1, len(loaded)), max_loaded_models=max(1, len(loaded)))
    if info.kind == "llama.cpp" and info.max_loaded_models is not None:
        return Limits(max_concurrency=slots * info.max_loaded_models, max_loaded_models=info.max_loaded_models)
    if info.kind == "llama.cpp" and info.slots is not None:
        return Limits(max_concurrency=info.slots)
    return Limits()


class Auto:
    """Asks a transport's server for its limits.

    Args:
        at_most: Generations at a time, whatever the server can do.
    """

    def __init__(self, at_most: float = math.inf) -> None:
        self._at_most = at_most

    async def __call__(self, transport: Transport) -> Limits:
        """The limits, as the server is now."""
        from lmbridge.client.server_info import describe  # noqa: PLC0415 - who does not ask need not wait for it

        server = Server(transport, again=None, timeouts=Timeouts(), max_retries=0, names=ModelNames("ignore"))
        limits = limits_of(await describe(server, None))
        return attrs.evolve(limits, max_concurrency=int(min(limits.max_concurrency, self._at_most)))


def checked_limits(limits: Limits | Auto | Literal["auto"] | None) -> Limits | FindLimits | None:
    """Limits as `Transport` takes them.

    Raises:
        LLMValidationError: they are none.
    """
    if limits == "auto" or isinstance(limits, Auto):
        return Auto() if limits == "auto" else limits
    return check_instance("limits", limits, Limits, optional=True, hint='pass "auto" to ask the server')
