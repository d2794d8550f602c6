"""Finds the limits of a server, for clients with `limits="auto"` and for clients without the option `limits`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal

import attrs

from lmbridge._checks import check_instance, hint_for
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.served_model import MismatchPolicy
from lmbridge.config import QUESTION_HEADER, Limits, Timeouts, is_near
from lmbridge.transport import Transport
from lmbridge.transport.limit_search import LimitFinder

if TYPE_CHECKING:
    from lmbridge.client.server_info import ServerInfo

DEFAULT_SLOTS: Final = 4
"""The number of slots that is assumed for LM Studio or a llama.cpp router if it reports none: the default of both."""


def limits_of(info: ServerInfo) -> Limits:
    """Returns the limits that fit a server.

    - LM Studio: as many models as are loaded, at least one, and the slots of all of them. LM Studio unloads a model
      that it loaded on demand when the next one is requested, even in the middle of a generation. This is its setting
      Auto-Evict, which is on by default and which no API reports.
    - llama.cpp with one model: the slots of the model.
    - llama.cpp's router: the number of models that it can hold, and the slots of all of them.
    - Any other server: the defaults of `Limits`. Ollama and vLLM queue by themselves, and finish what they have begun.

    If the models of a server have different numbers of slots, the smallest number counts for each of them.
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


def auto_limits(at_most: float = math.inf) -> LimitFinder:
    """Returns the `LimitFinder` for `limits="auto"`, which asks the server before the first request.

    Args:
        at_most: The limit on concurrent generations that applies even if the server can handle more. Default: no limit.
    """

    async def find(transport: Transport) -> Limits:
        # Imported here because programs with fixed limits never need it.
        from lmbridge.client.server_info import describe  # noqa: PLC0415

        return _at_most(limits_of(await describe(_server_of(transport), None)), at_most)

    return LimitFinder(find=find)


def default_limits(max_concurrency: int | None = None) -> LimitFinder:
    """Returns the `LimitFinder` for a client without the option `limits`.

    It asks only a server on this machine or in a private network, only when the limits first matter, and only what is
    needed to recognize LM Studio and llama.cpp. For any other server, it returns the defaults: such a server queues by
    itself, and finishes what it has begun.

    Args:
        max_concurrency: The most concurrent generations. Default: that of the server, or of `Limits()`.
    """
    plain = Limits() if max_concurrency is None else Limits(max_concurrency=max_concurrency)

    async def find(transport: Transport) -> Limits:
        # Imported here because most programs never need it.
        from lmbridge.client.server_info import describe_lmstudio_or_llama_cpp  # noqa: PLC0415

        if not is_near(transport.api_base):
            return plain
        info = await describe_lmstudio_or_llama_cpp(_server_of(transport, dict([QUESTION_HEADER])))
        if info is None or (limits := limits_of(info)) == Limits():
            return plain
        return _at_most(limits, math.inf if max_concurrency is None else max_concurrency)

    return LimitFinder(find=find, until_known=plain, only_when_needed=True)


def _at_most(limits: Limits, max_concurrency: float) -> Limits:
    return attrs.evolve(limits, max_concurrency=int(min(limits.max_concurrency, max_concurrency)))


def _server_of(transport: Transport, headers: Mapping[str, str] | None = None) -> ServerApi:
    return ServerApi(
        transport,
        make_transport=None,
        timeouts=Timeouts(),
        max_retries=0,
        mismatch_policy=MismatchPolicy("ignore"),
        headers=headers,
    )


_MISPLACED: Final = {"int": "pass Limits(max_concurrency=...)", "Timeouts": "pass it as timeout="}


def resolve_limits(limits: Limits | LimitFinder | Literal["auto"] | None) -> Limits | LimitFinder:
    """Returns the option `limits` of a client in the form that `Transport` takes.

    Raises:
        LLMValidationError: The option is neither a `Limits`, nor "auto", nor None.
    """
    if limits is None:
        return default_limits()
    if limits == "auto":
        return auto_limits()
    if isinstance(limits, LimitFinder):
        return limits
    hint = hint_for(limits, _MISPLACED, 'pass "auto" to ask the server')
    check_instance("limits", limits, Limits, optional=True, hint=hint)
    return limits
