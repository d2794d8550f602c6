"""Asks the model for one answer, shows it while it arrives, and measures it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lmbridge.cli.answer_view import AnswerView
from lmbridge.client import LLMClient
from lmbridge.client.answer_text import text_of
from lmbridge.client.reasoning import ReasoningSplitter


@attrs.define(kw_only=True)
class StreamedAnswer:
    """An answer, or the part of an answer that had arrived before an interruption."""

    reply: Mapping[str, Any] | None = None
    """The reply of the server, as `collect` returns it; None if nothing has arrived."""
    first_token_seconds: float | None = None
    """The seconds until the first piece of text or reasoning arrived, or None if none has arrived."""
    seconds: float = 0.0
    """The seconds until the end of the answer."""

    @property
    def text(self) -> str:
        """The text, without the reasoning before it."""
        return "" if self.reply is None else text_of(self.reply)

    @property
    def finish_reason(self) -> str | None:
        """Why the server stopped, such as "stop" or "length", or None if it has not said so."""
        reason: str | None = None if self.reply is None else self.reply["choices"][0].get("finish_reason")
        return reason

    @property
    def usage(self) -> Mapping[str, Any]:
        """The tokens that the server has counted; empty if it has reported none."""
        return (self.reply or {}).get("usage") or {}

    @property
    def tokens_per_second(self) -> float | None:
        """How fast the model wrote, or None if that is not known.

        If the server has not measured it, it is computed from the times at which the tokens arrived.
        """
        timings = (self.reply or {}).get("timings")
        if isinstance(timings, Mapping) and isinstance(measured := timings.get("predicted_per_second"), int | float):
            return float(measured)
        tokens = self.usage.get("completion_tokens")
        if not isinstance(tokens, int) or tokens < 2 or self.first_token_seconds is None:
            return None
        writing = self.seconds - self.first_token_seconds
        # The time is measured from the first token on, so the first token does not count.
        return (tokens - 1) / writing if writing > 0 else None

    def status(self, context_length: int | None) -> str:
        """Returns the line below the answer: its tokens, its speed, and how full the context is."""
        usage, parts = self.usage, []
        if isinstance(tokens := usage.get("completion_tokens"), int):
            parts.append(f"{tokens} token{'' if tokens == 1 else 's'}")
        if (speed := self.tokens_per_second) is not None:
            parts.append(describe_speed(speed))
        if self.first_token_seconds is not None:
            parts.append(f"first after {self.first_token_seconds:.2f} s")
        if isinstance(used := usage.get("total_tokens"), int):
            parts.append(describe_context(used, context_length))
        return " · ".join(parts)


def describe_speed(tokens_per_second: float) -> str:
    """Returns how fast a model writes, for a line about an answer."""
    return f"{tokens_per_second:.1f} tokens/s"


def describe_context(used: int, length: int | None) -> str:
    """Returns how many tokens of the context are in use, and the length of the context if it is known."""
    of = f" of {length} ({100 * used / length:.0f}%)" if length else ""
    return f"context {used}{of}"


async def stream_answer(
    client: LLMClient,
    messages: Sequence[Mapping[str, Any]],
    view: AnswerView,
    answer: StreamedAnswer,
    params: Mapping[str, Any],
) -> None:
    """Asks the model, and shows the answer while it arrives.

    Args:
        client: The client of the server.
        messages: The conversation.
        view: Shows the answer.
        answer: The object that receives the answer. If this coroutine is cancelled, it contains what had arrived.
        params: Parameters of the request.

    Raises:
        LLMError: The server failed; `.partial` is what had arrived.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    splitter = ReasoningSplitter()
    view.wait("waiting for the model ...")
    options = {"stream_options": {"include_usage": True}, **params}
    async with client.stream_chat(messages, **options) as stream:
        try:
            async for chunk in stream:
                pieces = list(splitter.feed(chunk))
                if pieces and answer.first_token_seconds is None:
                    answer.first_token_seconds = loop.time() - started
                _show(view, pieces)
            _show(view, list(splitter.close()))
        finally:
            answer.seconds = loop.time() - started
            answer.reply = stream.partial


def _show(view: AnswerView, pieces: Sequence[tuple[str, str]]) -> None:
    for kind, text in pieces:
        if kind == "reasoning":
            view.reasoning(text)
        else:
            view.text(text)
