"""Text completions (`/v1/completions`): the continuation of a prompt, with no chat template around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lmbridge.client.answer_text import StreamedText
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.chat_accumulator import TextAccumulator
from lmbridge.client.chat_stream import CompletionStream
from lmbridge.client.completion_shape import complete_text_reply
from lmbridge.client.error_body import Redact
from lmbridge.client.input_checks import check_texts
from lmbridge.client.served_model import MismatchPolicy
from lmbridge.transport import EventStream
from lmbridge.types import TextCompletion, TextCompletionChunk


class TextStream(CompletionStream[TextCompletionChunk, TextCompletion]):
    """The chunks of one text completion, as the server sent them, with the fields that lmbridge guarantees.

    It is used like a `ChatStream`, and raises the same errors. `.partial` and the result of `collect` have the shape of
    a plain text completion.
    """

    __slots__ = ()

    def __init__(self, events: EventStream, mismatch_policy: MismatchPolicy, redact: Redact, choices: int = 1) -> None:
        super().__init__(events, mismatch_policy, redact, TextAccumulator(choices))

    def text(self) -> StreamedText:
        """Returns an iterator over the pieces of the text; of several answers, only the first one counts."""
        return StreamedText(self, _text_of_chunk)


async def request_text_completion(
    server: ServerApi, body: dict[str, Any], *, stream: bool
) -> TextCompletion | TextStream:
    """Sends the request of `LLMClient.text_completion`, and returns its reply or stream."""
    prompts = len(check_texts("prompt", body["prompt"], allow_empty=True))
    request = server.build_post("text completion", "/completions", body, body.get("model"))
    if stream:
        n = body.get("n")
        choices = prompts * (n if isinstance(n, int) else 1)
        return TextStream(await server.stream(request), server.mismatch_policy, server.redact, choices)
    reply = await server.request(request)
    expected = "a text completion" if prompts == 1 else f"text completions of {prompts} prompts"
    value = await server.read_completion(reply, _has_texts, expected)
    if len(value["choices"]) < prompts:
        raise server.unexpected_reply(reply, expected)
    server.check_served_model(reply, value)
    return cast("TextCompletion", value)


def _has_texts(value: dict[str, Any]) -> bool:
    return complete_text_reply(value) and bool(value["choices"])


def _text_of_chunk(chunk: Mapping[str, Any]) -> str:
    return "".join(choice.get("text") or "" for choice in chunk["choices"] if not choice.get("index"))
