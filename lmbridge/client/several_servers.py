"""Several servers in one client: how their transports are made, and how a question is put to all of them.

Requests that generate something go through a `NodePool`, which chooses a server. Questions about servers, such as the
list of models, are asked of each server, and this module puts the answers together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import attrs

from lmbridge._tasks import run_together
from lmbridge.client.served_model import MismatchPolicy
from lmbridge.config import Timeouts
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.transport import BaseTransport, Transport

if TYPE_CHECKING:
    from lmbridge.client.api_requests import ServerApi
    from lmbridge.client.server_info import ModelInfo, ServerInfo
    from lmbridge.transport.node import ModelState

_T = TypeVar("_T")
_URLS_HINT: Final = "for example ['http://127.0.0.1:1234/v1', 'http://127.0.0.1:9931/v1']"


def connect(api_base: str | Sequence[str] | None, **options: Any) -> BaseTransport:
    """Returns a transport to a server, or to several servers with the same options.

    Raises:
        LLMValidationError: An argument is not valid.
    """
    if not isinstance(api_base, list | tuple):
        return Transport(cast("str | None", api_base), **options)
    if not api_base:
        raise LLMValidationError("api_base is an empty list", hint=_URLS_HINT)
    if len(api_base) == 1:
        return Transport(api_base[0], **options)
    # Imported here because few programs use several servers.
    from lmbridge.transport.node_pool import NodePool  # noqa: PLC0415

    return NodePool([Transport(each, **options) for each in api_base])


# The models of a server, which the pool asks for


@attrs.frozen
class _ListedModels:
    """The models of a server, as a `ModelDirectory`."""

    info: ServerInfo

    def state_of(self, model: str) -> ModelState:
        from lmbridge.client.server_info import entries_named  # noqa: PLC0415 - see `find_models`

        entries = entries_named(self.info.models, model)
        if not entries:
            return "missing"
        return "listed" if all(each.loaded is False for each in entries) else "loaded"


async def find_models(transport: Transport) -> _ListedModels:
    """Asks a server which models it has. The pool of several servers calls it.

    Raises:
        LLMError: The server did not answer, or refused the key.
    """
    # Imported here because programs with one server never need it.
    from lmbridge.client.api_requests import ServerApi  # noqa: PLC0415
    from lmbridge.client.server_info import describe  # noqa: PLC0415 - as above

    server = ServerApi(
        transport, make_transport=None, timeouts=Timeouts(), max_retries=0, mismatch_policy=MismatchPolicy("ignore")
    )
    return _ListedModels(await describe(server, None))


# Questions to all servers


async def ask_each(server: ServerApi, ask: Callable[[ServerApi], Awaitable[_T]]) -> dict[str, _T | LLMError]:
    """Asks all servers the same question at the same time, and returns the answers and errors by the servers' URLs."""

    async def answer_or_error(each: ServerApi) -> _T | LLMError:
        try:
            return await ask(each)
        except LLMError as error:
            return error

    servers = server.each()
    outcomes = await run_together(map(answer_or_error, servers))
    return {each.transport.api_base: outcome for each, outcome in zip(servers, outcomes, strict=True)}


async def answers_of(server: ServerApi, ask: Callable[[ServerApi], Awaitable[_T]]) -> list[_T]:
    """Returns the answers of those servers that answer.

    Raises:
        LLMError: No server answers; it is the error of the first one.
    """
    if len(server.transport.nodes) == 1:
        return [await ask(server)]
    outcomes = list((await ask_each(server, ask)).values())
    answers = [each for each in outcomes if not isinstance(each, LLMError)]
    errors = [each for each in outcomes if isinstance(each, LLMError)]
    if not answers:
        raise errors[0]
    return answers


def combined_info(infos: Sequence[ServerInfo]) -> ServerInfo:
    """Returns what several servers have in common, and the models of all of them.

    A model that several servers have is listed once, with the smallest context length, so that a request which fits
    into it fits at every server. The model counts as loaded if any of the servers has loaded it. It can see images or
    call tools if it can do so at each of them.
    """
    if len(infos) == 1:
        return infos[0]
    models: dict[str, ModelInfo] = {}
    for model in (each for info in infos for each in info.models):
        models[model.id] = _combined_model(models[model.id], model) if model.id in models else model
    first = infos[0]
    return attrs.evolve(
        first,
        kind=first.kind if all(info.kind == first.kind for info in infos) else "unknown",
        version=first.version if all(info.version == first.version for info in infos) else None,
        models=tuple(models.values()),
        context_length=smallest(*(info.context_length for info in infos)),
        slots=smallest(*(info.slots for info in infos)),
        max_loaded_models=smallest(*(info.max_loaded_models for info in infos)),
    )


def _combined_model(one: ModelInfo, other: ModelInfo) -> ModelInfo:
    return attrs.evolve(
        one,
        loaded=_any_of(one.loaded, other.loaded),
        status=other.status if other.loaded and not one.loaded else one.status,
        context_length=smallest(one.context_length, other.context_length),
        slots=smallest(one.slots, other.slots),
        embeds=one.embeds and other.embeds,
        vision=_all_of(one.vision, other.vision),
        tools=_all_of(one.tools, other.tools),
        size_bytes=smallest(one.size_bytes, other.size_bytes),
    )


def _any_of(*flags: bool | None) -> bool | None:
    """Returns whether any of the flags is True, or None if that depends on one which is not known."""
    return True if True in flags else None if None in flags else False


def _all_of(*flags: bool | None) -> bool | None:
    """Returns whether all of the flags are True, or None if that depends on one which is not known."""
    return False if False in flags else None if None in flags else True


def smallest(*values: int | None) -> int | None:
    """Returns the smallest of the values that are not None, or None if all of them are."""
    return min((value for value in values if value is not None), default=None)
