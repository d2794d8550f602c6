"""Structured answers: a request contains the schema of a type, and the answer becomes an instance of that type.

Servers accept a schema only if it describes an object. The schema of any other type, such as a list or a union, is
wrapped in the schema of an object with one field, and the value of that field is returned. An answer that is not such
an object is still read as the type itself: a server that ignores the schema has not shown the model the name of the
field.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Generic, TypeVar, get_args, get_origin

import attrs
import msgspec

from lmbridge._text import excerpt, replace_lone_surrogates, shorten
from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.collecting import collect
from lmbridge.client.embedded_json import find_only_value, is_json
from lmbridge.client.reasoning import split_reasoning
from lmbridge.client.repeated_text import ends_in_repetition
from lmbridge.client.sendable_schemas import simplify_answer_schema
from lmbridge.client.type_mismatches import describe_fault
from lmbridge.client.type_stand_ins import cached_for_type
from lmbridge.client.typed_json import TypedJson
from lmbridge.errors import LLMResponseError, LLMValidationError
from lmbridge.types import ChatCompletion

logger: logging.Logger = logging.getLogger("lmbridge.client")

T = TypeVar("T")

_RESERVED_PARAMETERS: Final = ("n", "response_format", "stream")
_WRAPPER_FIELD: Final = "answer"
"""The field of the wrapping object that holds the value of a type that is not an object."""
_TYPES_HINT: Final = (
    "give a dataclass, a pydantic model, an attrs class, a TypedDict or a msgspec.Struct, or a list or a union of these"
)
_FREQUENCY_PENALTY: Final = 0.6
"""The `frequency_penalty` for a model that has repeated itself.

Of 13 answers of SmolLM2-135M that were cut off, most of them in a loop, 7 became valid with 0.6, and 4 each with 0.3
and 1.0.
"""
_REFUSALS: Final = (400, 422)
"""The statuses with which servers refuse a parameter."""
_QUOTED_CHARACTERS: Final = 8_000
"""The number of characters of a wrong answer that are sent back to the model."""


@attrs.frozen
class AnswerFormat(Generic[T]):
    """The schema with which an answer of a type is requested, and the decoder of the answer."""

    name: str
    """The name of the type."""
    response_format: Mapping[str, Any]
    """The parameter of the request, with the type's JSON schema."""
    _typed: TypedJson[T]
    _wrapper: msgspec.json.Decoder[dict[str, msgspec.Raw]] | None = None
    """Decodes the object around the value; None for a type that is an object itself."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema that the server gets."""
        schema: Mapping[str, Any] = self.response_format["json_schema"]["schema"]
        return schema

    def decode(self, text: str, *, is_cut: bool = False) -> T:
        """Returns the instance that the text of an answer stands for.

        Prose around the value is ignored, unless the text holds several different values.

        Args:
            text: The text of the answer.
            is_cut: Whether the answer was cut off. If so, prose is not ignored, because another value may begin in it.

        Raises:
            InvalidAnswerError: The text is not valid JSON, or does not fit the type.
        """
        text = without_fence(text)
        try:
            return self._decode_whole(text)
        except InvalidAnswerError:
            value = None if is_cut else find_only_value(text, with_arrays=self._wrapper is not None)
            if value is None:
                raise
        return self._decode_whole(value.text)

    def _decode_whole(self, text: str) -> T:
        value, prefix = self._unwrapped(text)
        try:
            return self._typed.decode(value)
        except (ValueError, RecursionError) as exc:
            path, fault = describe_fault(exc)
            raise InvalidAnswerError(path.replace("$", prefix, 1), fault) from exc

    def _unwrapped(self, text: str) -> tuple[str, str]:
        """Returns the JSON text of the value, and the path to it within the answer."""
        if self._wrapper is not None:
            try:
                fields = self._wrapper.decode(text)
            except (ValueError, RecursionError):
                return text, "$"
            if list(fields) == [_WRAPPER_FIELD]:
                return bytes(fields[_WRAPPER_FIELD]).decode(), f"$.{_WRAPPER_FIELD}"
        return text, "$"


class InvalidAnswerError(ValueError):
    """An answer that does not fit its type.

    Attributes:
        path: Where the mistake is, such as `$.items[2].price`.
        fault: What is wrong there.
    """

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"{path}: {fault}")
        self.path: str = path
        self.fault: str = fault


async def parse(
    ask: Callable[..., Awaitable[ChatStream]],
    messages: Sequence[Mapping[str, Any]],
    type_: Any,
    params: Mapping[str, Any],
    *,
    url: str,
) -> Any:
    """Asks for an instance of a type.

    A wrong answer is sent back once, with a description of the mistake. If the model repeated itself until its answer
    was cut off, it is asked once more with a `frequency_penalty`, unless the caller has set one.

    Args:
        ask: The client's `chat_completion`.
        messages: The messages.
        type_: The type of the answer.
        params: Further parameters of the request.
        url: The URL of the server, for errors.

    Raises:
        LLMValidationError: An argument is not valid, or the last answer was wrong as well.
        LLMError: A request failed.
    """
    if reserved := [name for name in _RESERVED_PARAMETERS if name in params]:
        raise LLMValidationError(
            f"parse() does not accept {' and '.join(reserved)}, because it sets them itself",
            hint="leave them out, or use chat_completion()",
        )
    answer_format = answer_format_of(type_)
    # The requests are streamed, because many servers notice a cancelled request only at their next write.
    ask_streamed = partial(ask, stream=True, response_format=answer_format.response_format, **params)
    context = {"operation": "structured answer", "url": url}
    is_corrected = False
    penalty: dict[str, float] = {}
    repeated: LLMValidationError | None = None
    attempts = 0
    while True:
        attempts += 1
        try:
            reply = await collect(await ask_streamed(messages, **penalty))
        except LLMResponseError as refusal:
            if repeated is not None and refusal.status in _REFUSALS:
                # The server does not accept the penalty. The error of the attempt without the penalty says more.
                raise repeated from refusal
            raise
        try:
            return _decode_answer(reply, answer_format, {**context, "attempts": attempts})
        except LLMValidationError as error:
            if "path" in error.context and not is_corrected:
                is_corrected = True
                messages = [*messages, *_correction(error)]
            elif _repeats_itself(reply) and not penalty and "frequency_penalty" not in params:
                penalty, repeated = {"frequency_penalty": _FREQUENCY_PENALTY}, error
                logger.info(
                    "the model repeated itself until its answer was cut off; it is asked again with %s", penalty
                )
            else:
                raise


# Reading the answer


def _decode_answer(reply: ChatCompletion, answer_format: AnswerFormat[T], context: Mapping[str, Any]) -> T:
    """Returns the instance that a reply holds.

    Raises:
        LLMValidationError: The reply contains no such instance. The `context` of the error has a `path` if the model
            may be able to correct its answer.
    """
    text = _answer_text(reply)
    is_cut = reply["choices"][0].get("finish_reason") == "length"
    try:
        return answer_format.decode(text, is_cut=is_cut)
    except InvalidAnswerError as exc:
        context = {**context, "model": reply.get("model")}
        if is_cut and _repeats_itself(reply):
            message = "the model repeated itself until its answer was cut off"
            hint = "set frequency_penalty or temperature to other values, or ask a larger model"
        elif is_cut:
            message, hint = "the answer was cut off", "raise max_tokens, or load the model with a longer context"
        elif not text:
            message, hint = _explain_empty_answer(reply)
        else:
            context["path"] = exc.path
            message = f"the answer is not a valid {answer_format.name}: {exc}"
            hint = "its text is in .body; say in the prompt what the fields are, or ask a larger model"
        raise LLMValidationError(message, exc, hint=hint, context=context, body=text, partial=reply) from exc


def _repeats_itself(reply: ChatCompletion) -> bool:
    """Returns whether a reply was cut off while the model wrote the same words over and over again."""
    choice = reply["choices"][0]
    if choice.get("finish_reason") != "length":
        return False
    content = choice["message"].get("content") or ""
    return ends_in_repetition(content) or (not content.strip() and ends_in_repetition(split_reasoning(reply).reasoning))


def _answer_text(reply: ChatCompletion) -> str:
    """Returns the answer without the reasoning before it."""
    message: Mapping[str, Any] = reply["choices"][0]["message"]
    text: str = message.get("content") or ""
    if not text.strip():
        is_other = message.get("tool_calls") or message.get("refusal")
        return "" if is_other else answer_in_reasoning(split_reasoning(reply).reasoning)
    # In an answer that is JSON, or begins like a JSON object, a tag such as `<think>` is a part of some string.
    if not text.lstrip().startswith("{") and not is_json(without_fence(text)):
        text = split_reasoning(reply).text
    return text.strip()


def answer_in_reasoning(reasoning: str) -> str:
    """Returns the reasoning if it is in fact the answer, and otherwise an empty string.

    It is meant for a reply without any text. A server that expects reasoning takes the whole output for reasoning if
    the model did not reason. So the reasoning is the answer if it is JSON, or ends with the only JSON value in it.
    """
    text = without_fence(reasoning)
    value = find_only_value(text, with_arrays=True)
    return text if is_json(text) or (value is not None and value.is_last) else ""


def without_fence(text: str) -> str:
    """Returns a text without blanks around it, and without a Markdown fence around the whole of it."""
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
    """Returns the format of answers of a type, which is computed once for each type.

    Raises:
        LLMValidationError: The type, or a field of it, cannot be expressed in JSON.
    """
    try:
        return _cached_answer_format(type_)
    except (TypeError, NameError, RecursionError) as exc:
        # The last line of msgspec's text says what is wrong; those before it say how to extend msgspec.
        reason = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc).rpartition("\n")[2]
        raise LLMValidationError(
            f"cannot parse an answer as {_type_name(type_)}: {reason}", exc, hint=_TYPES_HINT
        ) from exc


@cached_for_type
def _cached_answer_format(type_: Any) -> AnswerFormat[Any]:
    if type_ is None:
        raise TypeError("it has no value but null")
    typed: TypedJson[Any] = TypedJson(type_)
    schema = simplify_answer_schema(typed.schema)
    name, wrapper = _type_name(type_), None
    if schema.get("type") != "object":
        name, wrapper = _long_type_name(type_), msgspec.json.Decoder(dict[str, msgspec.Raw])
        schema = simplify_answer_schema(_wrapped(typed.schema))
    label = re.sub(r"[^a-zA-Z0-9_-]+", "_", name).strip("_")[:64] or "answer"
    wire = {"type": "json_schema", "json_schema": {"name": label, "strict": True, "schema": schema}}
    return AnswerFormat(name, wire, typed, wrapper)


def _wrapped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of an object with one field that has the given schema."""
    value = {key: part for key, part in schema.items() if key != "$defs"}
    wrapper = {"type": "object", "properties": {_WRAPPER_FIELD: value}, "required": [_WRAPPER_FIELD]}
    return {**wrapper, "$defs": schema.get("$defs", {})}


def _type_name(type_: object) -> str:
    return str(getattr(type_, "__name__", type_))


def _long_type_name(type_: object) -> str:
    """Returns the name of a class, or the form of another type without the modules, such as `list[Book]`."""
    if get_origin(type_) is Annotated:
        type_ = get_args(type_)[0]
    if isinstance(type_, type) and not get_args(type_):
        return type_.__name__
    return re.sub(r"\b\w+\.(?=\w)", "", str(type_).replace("<locals>.", ""))
