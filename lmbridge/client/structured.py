"""Answers of a type: the schema that is sent to get one, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final, Generic, TypeVar

import attrs
import msgspec

from lmbridge._text import excerpt, replace_lone_surrogates, shorten
from lmbridge.client.reasoning import split_reasoning
from lmbridge.client.schemas import digestible, fault
from lmbridge.client.stream import ChatStream, collect
from lmbridge.errors import LLMValidationError
from lmbridge.types import ChatCompletion

T = TypeVar("T")

_OWN: Final = ("n", "response_format", "stream")
_TYPES: Final = "give a dataclass, an attrs class, a TypedDict or a msgspec.Struct; anything else can be a field of one"
_CUT: Final = (
    "raise max_tokens, load the model with a longer context, or bound the type's texts and lists with"
    " msgspec.Meta(max_length=...)"
)
_REPEATED: Final = 8_000
"""Characters of a wrong answer that the model is shown again."""


@attrs.frozen
class Answer(Generic[T]):
    """What an answer is to be."""

    name: str
    response_format: Mapping[str, Any]
    decoder: msgspec.json.Decoder[T]


async def parse(
    ask: Callable[..., Awaitable[ChatStream]],
    messages: Sequence[Mapping[str, Any]],
    type_: type[T],
    params: Mapping[str, Any],
    *,
    url: str,
) -> T:
    """Asks for an instance of a type; a wrong one is sent back once, with what is wrong about it.

    Args:
        ask: `chat_completion`.
        messages: The messages.
        type_: What the answer is to be.
        params: Further parameters of the request.
        url: The server, for errors.

    Raises:
        LLMValidationError: an argument cannot be right, or the answer is not what was asked for.
        LLMError: the request failed.
    """
    if own := [name for name in _OWN if name in params]:
        raise LLMValidationError(
            f"{' and '.join(own)} given to parse, which asks for one answer of its own format",
            hint="leave it out, or use chat_completion",
        )
    answer: Answer[T] = answer_of(type_)
    # Streamed: servers notice that a client has left only when they next write.
    streamed = partial(ask, stream=True, response_format=answer.response_format, **params)
    context = {"operation": "structured answer", "url": url}
    reply = await collect(await streamed(messages))
    try:
        return _read(reply, answer, {**context, "attempts": 1})
    except LLMValidationError as error:
        if "path" not in error.context:
            raise
        messages = [*messages, *_correction(error)]
    reply = await collect(await streamed(messages))
    return _read(reply, answer, {**context, "attempts": 2})


# Reading


def _read(reply: ChatCompletion, answer: Answer[T], context: Mapping[str, Any]) -> T:
    """The instance that a reply holds.

    Raises:
        LLMValidationError: it holds none; its `context` has a `path` if the model may do better when told what.
    """
    text = _text_of(reply)
    try:
        return answer.decoder.decode(text)
    except (ValueError, RecursionError) as exc:
        context = {**context, "model": reply.get("model")}
        choice = reply["choices"][0]
        if choice.get("finish_reason") == "length":
            what, hint = "the answer was cut off", "raise max_tokens, or load the model with a longer context"
        elif not text:
            what, hint = _nothing(reply)
        else:
            context["path"], reason = fault(exc)
            what = f"the answer is no {answer.name}: {context['path']}: {reason}"
            hint = "its text is in .body; say in the prompt what the fields are, or ask a larger model"
        raise LLMValidationError(what, exc, hint=hint, context=context, body=text, partial=reply) from exc


def _text_of(reply: ChatCompletion) -> str:
    """The answer without what the model thought before it, and without a fence around all of it."""
    text: str = reply["choices"][0]["message"].get("content") or ""
    if not text.lstrip().startswith("{"):  # a tag inside of JSON is none
        text = split_reasoning(reply).text
    text = text.strip()
    fence, _, rest = text.partition("\n")
    is_fenced = fence.rstrip().lower() in ("```", "```json") and rest.endswith("```")
    return rest.removesuffix("```").strip() if is_fenced else text


def _nothing(reply: ChatCompletion) -> tuple[str, str]:
    """Why there is no text, and what to do."""
    message: Mapping[str, Any] = reply["choices"][0]["message"]
    if message.get("tool_calls"):
        return "the model called a tool instead of answering", "give parse no tools; .partial has the calls"
    if refusal := message.get("refusal"):
        return f"the model refused: {excerpt(refusal)}", "ask otherwise, or ask another model"
    if split_reasoning(reply).reasoning:
        return "the model thought, but did not answer", "switch its thinking off; .partial has what it thought"
    return "the answer is empty", "ask again, or without parse: not every server and model can answer by a schema"


def _correction(error: LLMValidationError) -> list[dict[str, Any]]:
    """The messages that show the model its wrong answer, and say what is wrong about it."""
    shown = shorten(replace_lone_surrogates(error.body or ""), _REPEATED)
    told = f"That is wrong: {error.message}. Answer again, with the whole JSON object."
    return [{"role": "assistant", "content": shown}, {"role": "user", "content": told}]


# Schemas


def answer_of(type_: Any) -> Answer[Any]:
    """What an answer of a type is to be; found out once for each type.

    Raises:
        LLMValidationError: the type is none that is an object in JSON, or has a field that has no place in JSON.
    """
    try:
        return _answer_of(type_)
    except (TypeError, NameError) as exc:  # msgspec's last line says what it is, those before how to extend msgspec
        reason = str(exc).rpartition("\n")[2]
        raise LLMValidationError(f"cannot parse an answer as {_name(type_)}: {reason}", exc, hint=_TYPES) from exc


@lru_cache(maxsize=256)
def _answer_of(type_: Any) -> Answer[Any]:
    schema = digestible(msgspec.json.schema(type_))
    if schema.get("type") != "object":
        raise TypeError("it is no object in JSON")
    name = _name(type_)
    label = re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64]
    wire = {"type": "json_schema", "json_schema": {"name": label, "strict": True, "schema": schema}}
    return Answer(name, wire, msgspec.json.Decoder(type_))


def _name(type_: object) -> str:
    return str(getattr(type_, "__name__", type_))
