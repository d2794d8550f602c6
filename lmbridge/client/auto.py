"""The option `limits="auto"`: the client asks the server how many requests and models it can handle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal

import attrs

from lmbridge._checks import check_instance, hint_for
from lmbridge.client.names import MismatchPolicy
from lmbridge.client.server_api import ServerApi
from lmbridge.config import Limits, Timeouts
from lmbridge.transport import Transport
from lmbridge.transport.transport import FindLimits

if TYPE_CHECKING:
    from lmbridge.client.server_info import ServerInfo

DEFAULT_SLOTS: Final = 4
"""The slots of an LM Studio or a llama.cpp router that does not report them: both have this default."""


def limits_of(info: ServerInfo) -> Limits:
    """Returns the limits that fit a server.

    - LM Studio: the slots of its model, and as many models as are loaded, at least one. LM Studio unloads a model that
      it loaded on demand when the next one is requested, even in the middle of a generation. This is its setting
      Auto-Evict, which is on by default and which no API reports.
    - llama.cpp with one model: the slots of the model.
    - llama.cpp's router: the number of models that it holds, and the slots of all of them.
    - Any other server: the defaults of `Limits`. Ollama and vLLM queue by themselves, and finish what they have begun.
    """
    slots = info.slots or DEFAULT_SLOTS
    if info.kind == "lmstudio":
        loaded = [model for model in info.models if model.loaded and not model.embeds]
        return Limits(max_concurrency=slots * max(1, len(loaded)), max_loaded_models=max(1, len(loaded)))
    if info.kind == "llama.cpp" and info.max_loaded_models is not None:
        return Limits(max_concurrency=slots * info.max_loaded_models, max_loaded_models=info.max_loaded_models)
    if info.kind == "llama.cpp" and info.slots is not None:
        return Limits(max_concurrency=info.slots)
    return Limits()


class AutoLimits:
    """A callable that asks a server for its limits.

    A `Transport` accepts it in place of fixed limits, and calls it when it needs to know them.

    Args:
        at_most: The limit on concurrent generations that applies even if the server can handle more. Default: no limit.
    """

    def __init__(self, at_most: float = math.inf) -> None:
        self._at_most = at_most

    async def __call__(self, transport: Transport) -> Limits:
        """Returns the limits that fit the server now.

        Raises:
            LLMError: The server did not answer, or refused the key.
        """
        # Imported here because programs with fixed limits never need it.
        from lmbridge.client.server_info import describe  # noqa: PLC0415

        server = ServerApi(
            transport,
            make_transport=None,
            timeouts=Timeouts(),
            max_retries=0,
            mismatch_policy=MismatchPolicy("ignore"),
        )
        limits = limits_of(await describe(server, None))
        return attrs.evolve(limits, max_concurrency=int(min(limits.max_concurrency, self._at_most)))


_MISPLACED: Final = {"int": "pass Limits(max_concurrency=...)", "Timeouts": "pass it as timeout="}


def resolve_limits(limits: Limits | AutoLimits | Literal["auto"] | None) -> Limits | FindLimits | None:
    """Returns the option `limits` of a client in the form that `Transport` takes.

    Raises:
        LLMValidationError: The option is neither a `Limits`, nor "auto", nor None.
    """
    if limits == "auto":
        return AutoLimits()
    if isinstance(limits, AutoLimits):
        return limits
    return check_instance(
        "limits", limits, Limits, optional=True, hint=hint_for(limits, _MISPLACED, 'pass "auto" to ask the server')
    )
