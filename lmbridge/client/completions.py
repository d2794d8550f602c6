"""Text completions (`/v1/completions`): a prompt goes on, with no chat template around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from lmbridge.client import failures
from lmbridge.client.fold import TextFold
from lmbridge.client.inputs import checked_texts
from lmbridge.client.names import MismatchPolicy
from lmbridge.client.server_api import ServerApi
from lmbridge.client.stream import ReplyStream
from lmbridge.transport import Event, EventStream
from lmbridge.types import TextCompletion, TextCompletionChunk

_NULL: Final = b"null"


class TextStream(ReplyStream[TextCompletionChunk, TextCompletion]):
    """The chunks of one text completion, as the server sent them.

    It promises what a `ChatStream` does, and raises what that raises; `.partial` and `collect` have the shape of a
    plain text completion.
    """

    __slots__ = ()

    def __init__(self, events: EventStream, names: MismatchPolicy, redact: failures.Redact, answers: int = 1) -> None:
        super().__init__(events, names, redact, TextFold(answers))

    def _read_unusual(self, event: Event) -> TextCompletionChunk | None:
        if event == _NULL:
            return None  # llama.cpp sends one before each of several prompts
        return super()._read_unusual(event)


async def complete(server: ServerApi, body: dict[str, Any], *, stream: bool) -> TextCompletion | TextStream:
    """Asks for the continuation of a prompt; see `LLMClient.text_completion`."""
    prompts = len(checked_texts("prompt", body["prompt"], may_be_empty=True))
    request = server.build_post("text completion", "/completions", body, body.get("model"))
    if stream:
        answers = body.get("n")
        events = await server.stream(request)
        each = answers if isinstance(answers, int) else 1
        return TextStream(events, server.mismatch_policy, server.transport.redact, prompts * each)
    reply = await server.request(request)
    value = server.json_object(reply)
    if not _is_completion(value, prompts):
        raise server.unexpected_reply(
            reply, "a text completion" if prompts == 1 else f"text completions of {prompts} prompts"
        )
    server.check_served_model(reply, value)
    return cast("TextCompletion", value)


def _is_completion(value: Mapping[str, Any], prompts: int) -> bool:
    choices = value.get("choices")
    return (
        isinstance(choices, list)
        and len(choices) >= prompts
        and all(isinstance(choice, dict) and isinstance(choice.get("text"), str) for choice in choices)
    )
