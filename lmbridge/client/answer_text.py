"""The text of an answer: that of a whole reply, or that of a stream, piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Self

from lmbridge._checks import check_text, wrong_type
from lmbridge.client.content_parts import text_of_part
from lmbridge.client.reasoning import split_reasoning
from lmbridge.errors import LLMValidationError

_REPLY_HINT = "give what chat_completion(), text_completion(), create_response() or collect() returned"


def text_of(reply: Mapping[str, Any]) -> str:
    """Returns the text of a reply, without the reasoning before it; an empty string if it has only tool calls.

    For example::

        reply = await client.chat_completion([{"role": "user", "content": "Say hello."}])
        print(text_of(reply))

    Args:
        reply: The reply to a chat completion, a text completion or a response. Of several answers, the first one
            counts.

    Raises:
        LLMValidationError: The argument is not such a reply.
    """
    if not isinstance(reply, Mapping):
        raise wrong_type("reply", "the dict of a reply", reply, _REPLY_HINT)
    if isinstance(output := reply.get("output"), list):
        return _text_of_response(output)
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        raise wrong_type("reply", "a reply with choices or output", reply, _REPLY_HINT)
    if isinstance(text := choice.get("text"), str | list):
        return text_of_part(text)
    return split_reasoning(reply).text


def _text_of_response(output: list[Any]) -> str:
    contents = [item.get("content") for item in output if isinstance(item, Mapping) and item.get("type") == "message"]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return "".join(
        text_of_part(part.get("text"))
        for part in parts
        if isinstance(part, Mapping) and part.get("type") == "output_text"
    )


def check_question(question: Any, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages that a question is sent as.

    Raises:
        LLMValidationError: It is not a question, or a parameter makes no sense with it.
    """
    check_text("question", question, hint="give a text, or use chat_completion() for messages")
    if given := [name for name in ("messages", "n", "stream") if name in params]:
        raise LLMValidationError(f"ask() does not accept {' and '.join(given)}", hint="use chat_completion()")
    return [{"role": "user", "content": question}]


def check_answer(reply: Mapping[str, Any], *, has_limit: bool) -> str:
    """Returns the text of the answer to a question.

    Raises:
        LLMValidationError: The text is empty, or it was cut off although the caller gave no limit.
    """
    text = text_of(reply)
    if not text.strip():
        message, hint = "the answer has no text", "use chat_completion(); the whole reply is in .partial"
    elif reply["choices"][0].get("finish_reason") == "length" and not has_limit:
        message, hint = "the answer was cut off", "load the model with a longer context; what arrived is in .partial"
    else:
        return text
    context = {"operation": "chat completion", "model": reply.get("model")}
    raise LLMValidationError(message, hint=hint, context=context, partial=reply)


class StreamedText(AsyncIterator[str]):
    """The pieces of the text of a stream, which `stream.text()` returns.

    It is not an async generator, so that dropping it also drops the stream, which closes the connection.

    Args:
        stream: The stream, which nothing else may read.
        read: A function that returns the text in an item of the stream.
        finish: A function that returns the text that was held back until the end.
    """

    __slots__ = ("_finish", "_is_over", "_read", "_stream")

    def __init__(
        self, stream: AsyncGenerator[Any, None], read: Callable[[Any], str], finish: Callable[[], str] = str
    ) -> None:
        self._stream = stream
        self._read = read
        self._finish = finish
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """Returns the next piece, which is never empty."""
        while not self._is_over:
            try:
                item = await anext(self._stream)
            except StopAsyncIteration:
                self._is_over = True
                text = self._finish()
            else:
                text = self._read(item)
            if text:
                return text
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Closes the stream."""
        await self._stream.aclose()
