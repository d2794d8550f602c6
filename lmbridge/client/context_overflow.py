"""Prompts that are longer than the context, on servers that cut them without reporting it.

Ollama leaves out the beginning of a prompt that does not fit, answers as if nothing had happened, and counts the tokens
after the cut (ollama#3839, little-coder#128). llama.cpp, LM Studio and vLLM report an error. So with the option
`context_overflow`, the size of a prompt is compared with the context before the prompt is sent. The size is exact if
the server can count tokens, and an estimate otherwise. After the reply, or at the end of its stream, the number of
tokens that the server says it has read is compared with that size.

A server may not know the context length of a model that it has not loaded. For example, Ollama does not know it if the
model has no `num_ctx`. The server is then asked again after the first reply, for which it has loaded the model. The
alternative was to load the model only for this question. That could push another model out of memory for a request that
may never be sent.

If a server reports the overflow itself, `failures` makes the error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Literal, TypeAlias
from weakref import WeakKeyDictionary

import attrs

from lmbridge._checks import is_integer
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.server_info import awaits_load, context_length_of, describe
from lmbridge.client.token_count import count_tokens, estimate_tokens
from lmbridge.errors import ContextLengthExceededError, LLMError, TaskCancelledError
from lmbridge.transport import BaseTransport

logger: logging.Logger = logging.getLogger("lmbridge.client")

ContextOverflow: TypeAlias = Literal["raise", "warn"]
"""What happens if a prompt does not fit into the model's context."""

_PROMPT_FIELDS: Final = frozenset(
    {"messages", "tools", "model", "tool_choice", "response_format", "reasoning_effort"}
    | {"chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
)
"""The fields of a chat completion from which llama.cpp or vLLM makes the prompt, or finds the template for it."""
_CLEARLY_TOO_LONG: Final = 1.5
"""An estimate of more than this many times the context means that the prompt is too long, whatever its language."""
_MAY_BE_TOO_LONG: Final = 0.6
"""If an estimate exceeds this share of the context, the server is asked for an exact count."""
_TOKENS_TO_LEARN_FROM: Final = 500
"""Only prompts that are estimated at more tokens than this show how far estimates are off. In smaller ones, the chat
template dominates."""
_LEAST_FACTOR: Final = 3 / 8
_GREATEST_FACTOR: Final = 6.0
"""The bounds of a learned factor, in case a server counts wrongly. They stand for 8 bytes and half a byte per token."""
_ASK_AGAIN_SECONDS: Final = 60.0
"""Seconds after which the context length is requested again, because the model may have been loaded with another."""
OVERFLOW_HINT: Final = (
    "shorten the prompt, or load the model with a longer context; on Ollama, set num_ctx in a Modelfile or"
    " OLLAMA_CONTEXT_LENGTH"
)


@attrs.frozen
class PromptSize:
    """The size of a prompt, and of the context that it has to fit into."""

    tokens: int
    """How many tokens the prompt has."""
    exact: bool
    """Whether the server has counted them."""
    context_length: int
    """How many tokens fit into the context, the answer included."""

    @property
    def is_too_long(self) -> bool:
        """Whether the prompt has more tokens than fit into the context."""
        return self.tokens > self.context_length

    @property
    def is_clearly_too_long(self) -> bool:
        """Whether the prompt is too long for certain: by an exact count, or by a wide margin."""
        return self.tokens > (self.context_length if self.exact else _CLEARLY_TOO_LONG * self.context_length)

    def describe(self) -> str:
        """Returns a sentence about a prompt that does not fit."""
        about = "" if self.exact else "about "
        return f"the prompt has {about}{self.tokens} tokens, and the model's context has {self.context_length}"

    def was_cut(self, counted: object) -> bool:
        """Returns whether the server has left out a part of the prompt, judging by the tokens that it has read.

        If the tokens that it has read fill the whole context, there is no room for an answer. So they must be the rest
        of a longer prompt.

        Args:
            counted: The number of tokens that the server says it has read.
        """
        if not is_integer(counted) or counted <= 0:
            return False
        return counted >= self.context_length or (self.is_clearly_too_long and counted < self.tokens)


def describe_cut(counted: int, context_length: int) -> str:
    """Returns a sentence about a prompt that the server has cut."""
    cut = f"the server has cut the prompt to {counted} tokens without reporting it"
    return f"{cut}; the model's context has {context_length}"


def _learned_factors(server: ServerApi) -> dict[str | None, float]:
    """Returns, for each model, the ratio between the tokens that the server has counted and the estimate of them."""
    return _all_factors().setdefault(server.transport, {})


@cache
def _all_factors() -> WeakKeyDictionary[BaseTransport, dict[str | None, float]]:
    return WeakKeyDictionary()


@attrs.frozen
class _ContextLength:
    """What a server has said about the context length of a model."""

    tokens: int | None
    """The context length, or None if it is unknown."""
    asked_at: float
    """When the server was asked, by the clock of `check_prompt`."""
    awaits_load: bool = False
    """Whether it is unknown because the model was not loaded. The server is then asked again after a reply."""


@cache
def _context_lengths() -> WeakKeyDictionary[BaseTransport, dict[str | None, _ContextLength]]:
    """The context lengths of the models of each server."""
    return WeakKeyDictionary()


@attrs.frozen(eq=False)
class PromptCheck:
    """Compares a prompt that was sent with the tokens that the server says it has read."""

    _server: ServerApi
    _model: str | None
    _estimate: int
    """The tokens of the prompt, by an estimate that has learned nothing from earlier replies."""
    _size: PromptSize | None
    """The size of the prompt, or None if the context length becomes known only with the reply."""
    _timer: Callable[[], float]

    async def check_reply(self, reply: Mapping[str, Any]) -> None:
        """Compares the tokens that the server has read with the prompt, and learns from the difference.

        A reply without `usage` shows nothing.

        Args:
            reply: The whole reply, or the `usage` and the `model` of a stream that has ended.

        Raises:
            ContextLengthExceededError: The server has cut the prompt, and `context_overflow` is "raise".
        """
        size = self._size or await self._size_once_loaded()
        usage = reply.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        if size is None or not is_integer(counted) or counted <= 0:
            return
        if size.was_cut(counted):
            _report_overflow(self._server, describe_cut(counted, size.context_length), size, reply.get("model"), reply)
        elif self._estimate > _TOKENS_TO_LEARN_FROM:
            factor = min(max(counted / self._estimate, _LEAST_FACTOR), _GREATEST_FACTOR)
            _learned_factors(self._server)[self._model] = factor

    async def _size_once_loaded(self) -> PromptSize | None:
        length = await _context_length_once_loaded(self._server, self._model, self._timer)
        return None if length is None else _estimated_size(self._server, self._model, self._estimate, length)


async def check_prompt(
    server: ServerApi, body: Mapping[str, Any], *, timer: Callable[[], float] = time.monotonic
) -> PromptCheck | None:
    """Compares the prompt of a chat completion with the context of its model, as `context_overflow` asks for.

    Args:
        server: The server, with the options of the call.
        body: The body as the server reads it; see `estimate_tokens`.
        timer: The clock. Default: `time.monotonic`.

    Returns:
        The check to make when the reply has arrived, or None if the context length will still be unknown then.

    Raises:
        ContextLengthExceededError: The prompt does not fit, and `context_overflow` is "raise".
    """
    model = body.get("model")
    known = await _context_length(server, model, timer)
    context_length = known.tokens
    if context_length is None:
        return PromptCheck(server, model, estimate_tokens(body), None, timer) if known.awaits_load else None
    estimate = estimate_tokens(body)
    size = _estimated_size(server, model, estimate, context_length)
    if size.tokens > _MAY_BE_TOO_LONG * context_length:
        count = await count_tokens(server, {name: value for name, value in body.items() if name in _PROMPT_FIELDS})
        if count.exact:
            size = attrs.evolve(size, tokens=count.tokens, exact=True)
    if size.is_too_long:
        _report_overflow(server, size.describe(), size, model)
    return PromptCheck(server, model, estimate, size, timer)


def _estimated_size(server: ServerApi, model: str | None, estimate: int, context_length: int) -> PromptSize:
    """Returns the estimated size of a prompt, corrected by the factor that was learned from the model's replies."""
    tokens = round(estimate * _learned_factors(server).get(model, 1.0))
    return PromptSize(tokens, exact=False, context_length=context_length)


def _report_overflow(
    server: ServerApi, message: str, size: PromptSize, model: object, partial: Mapping[str, Any] | None = None
) -> None:
    if server.context_overflow == "warn":
        logger.warning("%s; model %r", message, model)
        return
    raise ContextLengthExceededError(
        message,
        prompt_tokens=size.tokens,
        context_length=size.context_length,
        hint=OVERFLOW_HINT,
        context={"operation": "chat completion", "url": server.transport.api_base, "model": model},
        partial=partial,
    )


async def _context_length(server: ServerApi, model: str | None, timer: Callable[[], float]) -> _ContextLength:
    """Returns the context length of a model.

    An answer is kept for a minute only, because the length may change, and because a server may be unable to answer for
    a while.
    """
    known = _context_lengths().setdefault(server.transport, {}).get(model)
    if known is not None and timer() - known.asked_at < _ASK_AGAIN_SECONDS:
        return known
    return await _request_context_length(server, model, timer)


async def _context_length_once_loaded(server: ServerApi, model: str | None, timer: Callable[[], float]) -> int | None:
    """Returns the context length of a model that was not loaded before its reply; None if it is still unknown.

    The server is asked only once. If it has unloaded the model in the meantime, it is asked again after a minute.
    """
    lengths = _context_lengths().setdefault(server.transport, {})
    known = lengths.get(model)
    if known is None or known.awaits_load:
        known = attrs.evolve(await _request_context_length(server, model, timer), awaits_load=False)
        lengths[model] = known
    return known.tokens


async def _request_context_length(server: ServerApi, model: str | None, timer: Callable[[], float]) -> _ContextLength:
    lengths = _context_lengths().setdefault(server.transport, {})
    try:
        infos = [await describe(each, model) for each in server.each()]
    except LLMError as error:
        # The generation that follows meets the same problem, and reports it.
        logger.debug("the context length of model %r is unknown: %s", model, error)
        unknown = _ContextLength(None, timer())
        if not isinstance(error, TaskCancelledError):
            lengths[model] = unknown
        return unknown
    tokens = min((each for info in infos if (each := context_length_of(info, model)) is not None), default=None)
    is_unloaded = tokens is None and any(awaits_load(info, model) for info in infos)
    lengths[model] = _ContextLength(tokens, timer(), is_unloaded)
    return lengths[model]
