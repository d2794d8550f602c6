"""The parameters of the API that lmbridge describes to editors and type checkers.

Each list is written once, as a TypedDict, and every overload of a method takes it as `**params: Unpack[...]`. Explicit
parameters would have to be repeated in each overload. A parameter that is not given is not sent. One that is given as
None is sent as `null`, because servers have a meaning for that, such as "no limit" or "no stop string". Parameters that
are not listed here are sent as well, because servers for local models have many others.

Options of other libraries, such as `api_version`, are refused in `call_options`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

from lmbridge.client.call_options import CallOptions

logger: logging.Logger = logging.getLogger("lmbridge.client")

_Function = TypeVar("_Function", bound=Callable[..., Any])


class SamplingParams(CallOptions, total=False):
    """Parameters of chat and text completions."""

    temperature: float | None
    """How freely the model chooses the next token: 0 takes the most likely one; 1 follows its probabilities."""
    top_p: float | None
    """Chooses among the most likely tokens whose probabilities add up to this number, from 0 to 1."""
    max_tokens: int | None
    """The most tokens that the model may generate. The finish reason is "length" if this limit cuts the answer off."""
    stop: str | Sequence[str] | None
    """One or several texts at which the model stops. They are not part of the answer."""
    seed: int | None
    """Makes sampling repeatable, as far as the server supports that."""
    n: int | None
    """How many answers to generate. Default: 1."""
    presence_penalty: float | None
    """From -2 to 2; positive numbers discourage tokens that the text already has."""
    frequency_penalty: float | None
    """From -2 to 2; positive numbers discourage a token in proportion to how often the text already has it."""
    logit_bias: Mapping[str, float] | None
    """Raises or lowers the likelihood of tokens, by token id: from -100 (never) to 100 (always)."""
    stream_options: Mapping[str, Any] | None
    """Options of a stream; `{"include_usage": True}` asks for a last chunk with the token usage."""
    user: str | None
    """An identifier of your end user, for servers that log it."""


class ChatParams(SamplingParams, total=False):
    """Parameters of a chat completion."""

    max_completion_tokens: int | None
    """The newer name of `max_tokens`. It includes the tokens of the reasoning."""
    tools: Sequence[Mapping[str, Any]] | None
    """The tools that the model may call: `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    tool_choice: Literal["none", "auto", "required"] | str | Mapping[str, Any] | None  # noqa: PYI051 - editors offer these
    """Whether the model calls a tool: "none", "auto", "required", or the tool that must be called."""
    parallel_tool_calls: bool | None
    """Whether the model may call several tools in one answer."""
    response_format: Mapping[str, Any] | None
    """The form of the answer, such as `{"type": "json_schema", "json_schema": {...}}`. See also `LLMClient.parse`."""
    logprobs: bool | None
    """Whether the answer has the log probabilities of its tokens."""
    top_logprobs: int | None
    """How many alternatives each token is reported with, if `logprobs` is set."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | str | None  # noqa: PYI051 - editors offer these
    """How much a reasoning model thinks before it answers."""


class TextParams(SamplingParams, total=False):
    """Parameters of a text completion."""

    suffix: str | None
    """The text that follows the gap which the model fills."""
    echo: bool | None
    """Whether the answer begins with the prompt."""
    best_of: int | None
    """How many answers the server generates, of which it returns the best `n`."""
    logprobs: int | None
    """For how many of the most likely tokens at each position the log probabilities are reported."""


class EmbeddingsParams(CallOptions, total=False):
    """Parameters of embeddings."""

    encoding_format: Literal["float", "base64"] | None
    """The form of an embedding: a list of numbers, or a string."""
    dimensions: int | None
    """The length of each embedding, for models that can shorten theirs."""
    user: str | None
    """An identifier of your end user, for servers that log it."""


class ResponseParams(CallOptions, total=False):
    """Parameters of a response."""

    instructions: str | None
    """The system message."""
    max_output_tokens: int | None
    """The most tokens that the model may generate, reasoning included."""
    temperature: float | None
    """How freely the model chooses the next token: 0 takes the most likely one; 1 follows its probabilities."""
    top_p: float | None
    """Chooses among the most likely tokens whose probabilities add up to this number, from 0 to 1."""
    tools: Sequence[Mapping[str, Any]] | None
    """The tools that the model may call, in the flat form of this API: `{"type": "function", "name", "parameters"}`."""
    tool_choice: Literal["none", "auto", "required"] | str | Mapping[str, Any] | None  # noqa: PYI051 - editors offer these
    """Whether the model calls a tool: "none", "auto", "required", or the tool that must be called."""
    parallel_tool_calls: bool | None
    """Whether the model may call several tools in one answer."""
    reasoning: Mapping[str, Any] | None
    """How a reasoning model thinks, such as `{"effort": "low"}`."""
    text: Mapping[str, Any] | None
    """The form of the answer, such as `{"format": {"type": "json_schema", ...}}`."""
    store: bool | None
    """Whether the server keeps the response, so that `previous_response_id` can continue it."""
    include: Sequence[str] | None
    """The names of further parts that the response should contain."""
    metadata: Mapping[str, str] | None
    """Up to 16 pairs of strings that are stored with the response."""
    truncation: Literal["auto", "disabled"] | None
    """Whether the server may drop the beginning of a conversation that is too long."""
    user: str | None
    """An identifier of your end user, for servers that log it."""


def shows_params(params: type) -> Callable[[_Function], _Function]:
    """Makes `help()` and `inspect.signature` show the fields of a TypedDict as parameters of a method.

    Type checkers and most editors read the fields from `Unpack`. Tools that inspect functions at run time, such as
    notebooks, cannot.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        kept = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=annotation)
            for name, annotation in _all_annotations(params).items()
            if name not in signature.parameters
        ]
        rest = [each for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD]
        # mypy does not know this attribute, which `inspect.signature` reads.
        function.__signature__ = signature.replace(parameters=[*kept, *named, *rest])  # type: ignore[attr-defined]
        return function

    return decorate


def _all_annotations(params: type) -> dict[str, str]:
    # `__annotations__` of a TypedDict includes those of its bases. Each is a forward reference, which holds a string.
    return {name: getattr(each, "__forward_arg__", str(each)) for name, each in params.__annotations__.items()}


_KNOWN_NAMES: Final[frozenset[str]] = frozenset().union(
    *(each.__optional_keys__ for each in (ChatParams, TextParams, EmbeddingsParams, ResponseParams))
)
_SYSTEM_PROMPT: Final = "a system prompt is a message: {'role': 'system', 'content': '...'}"
_HINTS: Final = {"system": _SYSTEM_PROMPT, "system_prompt": _SYSTEM_PROMPT}
_CLOSE: Final = 0.9
"""How similar to a known name an unknown one must be to count as a mistake. `temprature` is similar enough. `top_a`,
which is a parameter of some servers, is not similar enough to `top_p`."""


def warn_about_mistakes(names: Iterable[str]) -> None:
    """Logs a warning, once, about each parameter whose name looks like a mistake. The parameter is still sent."""
    for name in names:
        if name not in _KNOWN_NAMES:
            _warn_about(name)


@lru_cache(maxsize=1000)
def _warn_about(name: str) -> None:
    # Imported here because it is only needed for parameters that lmbridge does not know.
    import difflib  # noqa: PLC0415

    similar = difflib.get_close_matches(name, _KNOWN_NAMES, n=1, cutoff=_CLOSE)
    hint = _HINTS.get(name) or (f"did you mean {similar[0]!r}?" if similar else None)
    if hint is not None:
        logger.warning("the parameter %r is sent to the server unchanged; %s", name, hint)
