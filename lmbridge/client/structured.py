"""Structured answers: the schema of a type is sent along, and the answer becomes an instance of that type."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final, Generic, TypeVar

import attrs
import msgspec

from lmbridge._text import excerpt, replace_lone_surrogates, shorten
from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.reasoning import split_reasoning
from lmbridge.client.schemas import describe_fault, simplify_answer_schema
from lmbridge.client.stream import collect
from lmbridge.errors import LLMValidationError
from lmbridge.types import ChatCompletion

T = TypeVar("T")

_RESERVED_PARAMETERS: Final = ("n", "response_format", "stream")
_TYPES_HINT: Final = (
    "give a dataclass, an attrs class, a TypedDict or a msgspec.Struct; anything else can be a field of one"
)
_QUOTED_CHARACTERS: Final = 8_000
"""Characters of a wrong answer that are sent back to the model."""


@attrs.frozen
class AnswerFormat(Generic[T]):
    """How an answer of a type is asked for, and how it is read."""

    name: str
    """The name of the type."""
    response_format: Mapping[str, Any]
    """The parameter of the request, with the type's JSON schema."""
    decoder: msgspec.json.Decoder[T]


async def parse(
    ask: Callable[..., Awaitable[ChatStream]],
    messages: Sequence[Mapping[str, Any]],
    type_: type[T],
    params: Mapping[str, Any],
    *,
    url: str,
) -> T:
    """Asks for an instance of a type. A wrong answer is sent back once, with what is wrong about it.

    Args:
        ask: The client's `chat_completion`.
        messages: The messages.
        type_: The type of the answer.
        params: Further parameters of the request.
        url: The URL of the server, for errors.

    Raises:
        LLMValidationError: An argument cannot be right, or the second answer was wrong as well.
        LLMError: A request failed.
    """
    if reserved := [name for name in _RESERVED_PARAMETERS if name in params]:
        raise LLMValidationError(
            f"parse() does not accept {' and '.join(reserved)}, because it sets them itself",
            hint="leave them out, or use chat_completion()",
        )
    answer_format: AnswerFormat[T] = answer_format_of(type_)
    # Streamed, because many servers notice only when they next write that a client has cancelled its request.
    ask_streamed = partial(ask, stream=True, response_format=answer_format.response_format, **params)
    context = {"operation": "structured answer", "url": url}
    reply = await collect(await ask_streamed(messages))
    try:
        return _decode_answer(reply, answer_format, {**context, "attempts": 1})
    except LLMValidationError as error:
        if "path" not in error.context:
            raise
        messages = [*messages, *_correction(error)]
    reply = await collect(await ask_streamed(messages))
    return _decode_answer(reply, answer_format, {**context, "attempts": 2})


# Reading the answer


def _decode_answer(reply: ChatCompletion, answer_format: AnswerFormat[T], context: Mapping[str, Any]) -> T:
    """Returns the instance that a reply holds.

    Raises:
        LLMValidationError: It does not hold one. The `context` of the error has a `path` if the model may do better
            when it is shown what is wrong.
    """
    text = _bare_answer(reply)
    try:
        return answer_format.decoder.decode(text)
    except (ValueError, RecursionError) as exc:
        context = {**context, "model": reply.get("model")}
        choice = reply["choices"][0]
        if choice.get("finish_reason") == "length":
            message, hint = "the answer was cut off", "raise max_tokens, or load the model with a longer context"
        elif not text:
            message, hint = _explain_empty_answer(reply)
        else:
            context["path"], fault = describe_fault(exc)
            message = f"the answer is not a valid {answer_format.name}: {context['path']}: {fault}"
            hint = "its text is in .body; say in the prompt what the fields are, or ask a larger model"
        raise LLMValidationError(message, exc, hint=hint, context=context, body=text, partial=reply) from exc


def _bare_answer(reply: ChatCompletion) -> str:
    """Returns the answer without the reasoning before it, and without a Markdown fence around the whole of it."""
    text: str = reply["choices"][0]["message"].get("content") or ""
    # In an answer that begins as JSON does, a tag is a part of some string.
    if not text.lstrip().startswith("{"):
        text = split_reasoning(reply).text
    text = text.strip()
    fence, _, rest = text.partition("\n")
    is_fenced = fence.rstrip().lower() in ("```", "```json") and rest.endswith("```")
    return rest.removesuffix("```").strip() if is_fenced else text


def _explain_empty_answer(reply: ChatCompletion) -> tuple[str, str]:
    """Returns why a reply has no text, and what to do about it."""
    message: Mapping[str, Any] = reply["choices"][0]["message"]
    if message.get("tool_calls"):
        return "the model called a tool instead of answering", "give parse() no tools; .partial has the calls"
    if refusal := message.get("refusal"):
        return f"the model refused: {excerpt(refusal)}", "rephrase the question, or ask another model"
    if split_reasoning(reply).reasoning:
        return "the model reasoned, but did not answer", "switch its reasoning off; .partial has what it wrote"
    return "the answer is empty", "try again, or without parse(): not every server and model can follow a schema"


def _correction(error: LLMValidationError) -> list[dict[str, Any]]:
    """Returns the messages that show the model its wrong answer, and say what is wrong about it."""
    answer = shorten(replace_lone_surrogates(error.body or ""), _QUOTED_CHARACTERS)
    request = f"That is wrong: {error.message}. Answer again, with the whole JSON object."
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": request}]


# Asking for the answer


def answer_format_of(type_: Any) -> AnswerFormat[Any]:
    """Returns how an answer of a type is asked for and read. It is computed once for each type.

    Raises:
        LLMValidationError: JSON has no object for the type, or the type has a field that JSON has nothing for.
    """
    try:
        return _cached_answer_format(type_)
    except (TypeError, NameError) as exc:
        # The last line of msgspec's text says what is wrong; those before it say how to extend msgspec.
        reason = str(exc).rpartition("\n")[2]
        raise LLMValidationError(
            f"cannot parse an answer as {_type_name(type_)}: {reason}", exc, hint=_TYPES_HINT
        ) from exc


@lru_cache(maxsize=256)
def _cached_answer_format(type_: Any) -> AnswerFormat[Any]:
    schema = simplify_answer_schema(msgspec.json.schema(type_))
    if schema.get("type") != "object":
        raise TypeError("it is not an object in JSON")
    name = _type_name(type_)
    label = re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64]
    wire = {"type": "json_schema", "json_schema": {"name": label, "strict": True, "schema": schema}}
    return AnswerFormat(name, wire, msgspec.json.Decoder(type_))


def _type_name(type_: object) -> str:
    return str(getattr(type_, "__name__", type_))
