"""A chat client that plays scripted turns, for tests of agents that need no server.

An agent knows its client by the Protocol `ChatClient` alone, so this double replaces everything below it: no request is
made, nothing is scheduled, and nothing is retried. Use it if a test is about your tools and your prompts, and
`MockTransport` or `ScriptedServer` if it is about what servers send.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, overload

import attrs

from lmbridge._checks import check_instance, wrong_type
from lmbridge.agent.chat_client import ChunkStream
from lmbridge.agent.tools import ToolCall
from lmbridge.errors import LLMValidationError
from lmbridge.testing.completions import (
    completion,
    completion_chunk,
    message_deltas,
    split_words,
    usage_chunk,
    usage_of,
)

_TURNS_HINT: Final = (
    "a turn is a text, a FakeReply, a ToolCall or a list of them, a message as a dict, an exception,"
    " or a function of the messages that returns one of these"
)


@attrs.frozen(kw_only=True)
class FakeReply:
    """A reply of a `FakeChatClient` that has more than a text.

    ::

        FakeReply(text="Let me see.", tool_calls=[ToolCall("1", "weather", {"city": "Oslo"})])
    """

    text: str = ""
    """The text of the reply. The default is an empty text."""
    reasoning: str = ""
    """The reasoning, which is sent as `reasoning_content`. Default: none."""
    tool_calls: Sequence[ToolCall | Mapping[str, Any]] = ()
    """The calls: each is a `ToolCall`, or a dict in the form that a message has. An empty id is replaced."""
    finish_reason: str | None = None
    """The finish reason. By default it is "tool_calls" if there are calls, else "stop"."""
    usage: Mapping[str, Any] | None = None
    """The token usage. By default each word of the text is a token, and the prompt has one token."""
    model: str | None = None
    """The model that the reply names. By default it is the model that was asked for."""
    error: BaseException | None = None
    """An error that a stream raises at its end, in place of the finish reason. If the reply is not a stream, the error
    is raised in place of the reply."""


FakeAnswer: TypeAlias = (
    str | FakeReply | ToolCall | Sequence[ToolCall] | Mapping[str, Any] | BaseException | type[BaseException]
)
"""The reply of the model in one turn, or the exception that the client raises."""
FakeTurn: TypeAlias = FakeAnswer | Callable[[list[dict[str, Any]]], FakeAnswer | Awaitable[FakeAnswer]]
"""An answer, or a function that is called with the messages and returns one."""


@attrs.frozen(kw_only=True)
class FakeRequest:
    """A request that a `FakeChatClient` has received."""

    messages: list[dict[str, Any]]
    """The messages, as they were at the time of the request."""
    model: str | None
    """The model that the request names, or None."""
    stream: bool
    """Whether a stream was requested. Agents always request one."""
    params: Mapping[str, Any]
    """All other parameters, such as `max_tokens` and `tools`."""

    @property
    def tools(self) -> list[str]:
        """The names of the tools that the request offers."""
        return [each["function"]["name"] for each in self.params.get("tools") or ()]


class FakeChatClient:
    """A client whose model says what a test has scripted.

    ::

        client = FakeChatClient([ToolCall("1", "weather", {"city": "Oslo"}), "It rains in Oslo."])
        result = await Agent(client, tools=[weather]).run("What is the weather in Oslo?")
        assert result.text == "It rains in Oslo."
        assert client.requests[0].tools == ["weather"]

    Each request takes the next turn. A request after the last turn raises an `AssertionError`, which ends the run.

    Args:
        turns: The turns in order, from a list or any other iterable, or one function that is called for every request.
            A text is an answer; a `ToolCall`, or a list of them, is a reply with these calls; a `FakeReply` can have
            everything that a reply has; a dict is a message in OpenAI's form, such as one of `RunResult.messages`; an
            exception is raised in place of a reply. A function, which may be async, is called with the messages and
            returns one of these.
        model: The model of requests that name none, and the name in replies. The default is "fake-model".

    Raises:
        LLMValidationError: The turns are a single text or dict, or something that is not iterable, or `model` is not a
            string.
    """

    def __init__(
        self,
        turns: Iterable[FakeTurn] | Callable[[list[dict[str, Any]]], FakeAnswer | Awaitable[FakeAnswer]],
        *,
        model: str = "fake-model",
    ) -> None:
        if isinstance(turns, str | Mapping) or not (callable(turns) or isinstance(turns, Iterable)):
            raise wrong_type("turns", "a list of turns, or a function of the messages", turns, _TURNS_HINT)
        self._turns: Iterator[FakeTurn] = _repeat(turns) if callable(turns) else iter(turns)
        self._model: Final = check_instance("model", model, str)
        self.requests: list[FakeRequest] = []
        """All requests in order."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} model={self._model!r}, {len(self.requests)} requests so far>"

    @property
    def model(self) -> str | None:
        """The model of requests that name none."""
        return self._model

    @overload
    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = ..., stream: Literal[True], **params: Any
    ) -> ChunkStream: ...
    @overload
    async def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = ...,
        stream: Literal[False] = ...,
        **params: Any,
    ) -> dict[str, Any]: ...
    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, stream: bool = False, **params: Any
    ) -> ChunkStream | dict[str, Any]:
        """Plays the next turn.

        Args:
            messages: The conversation.
            model: The model, or None for the model of the client.
            stream: Whether the reply is an async generator of chunks or a whole completion.
            **params: Further fields of the request, which are only recorded.

        Raises:
            AssertionError: All turns have been used.
            BaseException: The turn is an exception, which is raised in place of a reply.
            LLMValidationError: The turn is not one of the kinds that `FakeChatClient` lists.
        """
        request = FakeRequest(
            messages=[dict(message) for message in messages], model=model, stream=stream, params=params
        )
        self.requests.append(request)
        reply = await self._next_reply(request)
        body = _ReplyBody(f"chatcmpl-{len(self.requests)}", reply, reply.model or model or self._model)
        return body.chunks(_wants_usage(params)) if stream else body.whole()

    async def _next_reply(self, request: FakeRequest) -> FakeReply:
        try:
            turn = next(self._turns)
        except StopIteration:
            last = str(request.messages[-1:])[:200]
            raise AssertionError(
                f"a FakeChatClient has been asked for turn {len(self.requests)}, but has only"
                f" {len(self.requests) - 1}; the last message is {last}"
            ) from None
        if not callable(turn) or isinstance(turn, type):
            return _as_reply(turn)
        answer = turn(request.messages)
        return _as_reply(await answer if inspect.isawaitable(answer) else answer)


@attrs.frozen
class _ReplyBody:
    """One reply in the form of OpenAI's API."""

    reply_id: str
    reply: FakeReply
    model: str

    def whole(self) -> dict[str, Any]:
        if self.reply.error is not None:
            raise self.reply.error
        message: dict[str, Any] = {"content": self.reply.text}
        if self.reply.reasoning:
            message["reasoning_content"] = self.reply.reasoning
        if calls := self._calls():
            message["tool_calls"] = calls
        return completion(self.reply_id, self.model, message, finish_reason=self._finish_reason(), usage=self._usage())

    async def chunks(self, with_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        for delta in message_deltas(self.reply.reasoning, split_words(self.reply.text), self._calls()):
            yield completion_chunk(self.reply_id, self.model, delta)
        if self.reply.error is not None:
            raise self.reply.error
        yield completion_chunk(self.reply_id, self.model, {}, finish_reason=self._finish_reason())
        if with_usage:
            yield usage_chunk(self.reply_id, self.model, self._usage())

    def _calls(self) -> list[dict[str, Any]]:
        return [_as_call(call, f"call_{self.reply_id}_{index}") for index, call in enumerate(self.reply.tool_calls)]

    def _finish_reason(self) -> str:
        return self.reply.finish_reason or ("tool_calls" if self.reply.tool_calls else "stop")

    def _usage(self) -> Mapping[str, Any]:
        return usage_of(split_words(self.reply.text)) if self.reply.usage is None else self.reply.usage


def _as_reply(turn: object) -> FakeReply:
    if isinstance(turn, BaseException) or (isinstance(turn, type) and issubclass(turn, BaseException)):
        raise turn
    match turn:
        case FakeReply():
            return turn
        case str():
            return FakeReply(text=turn)
        case ToolCall():
            return FakeReply(tool_calls=[turn])
        case Mapping():
            return _from_message(turn)
        case [*calls] if calls and all(isinstance(each, ToolCall) for each in calls):
            return FakeReply(tool_calls=[each for each in calls if isinstance(each, ToolCall)])
        case _:
            raise wrong_type("the turn of a FakeChatClient", "a reply", turn, _TURNS_HINT)


def _from_message(message: Mapping[Any, Any]) -> FakeReply:
    if not {"content", "tool_calls", "reasoning_content"} & set(message):
        raise LLMValidationError(
            "the turn of a FakeChatClient is a dict that is not a message",
            hint="a message has content or tool_calls; for a call, use lmbridge.ToolCall(id, name, arguments)",
        )
    return FakeReply(
        text=message.get("content") or "",
        reasoning=message.get("reasoning_content") or "",
        tool_calls=message.get("tool_calls") or (),
    )


def _as_call(call: ToolCall | Mapping[str, Any], made_up_id: str) -> dict[str, Any]:
    if not isinstance(call, ToolCall):
        return {"type": "function", **call, "id": call.get("id") or made_up_id}
    arguments = "{}" if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id or made_up_id, "type": "function", "function": function}


def _wants_usage(params: Mapping[str, Any]) -> bool:
    options = params.get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("include_usage"))


def _repeat(function: Any) -> Iterator[Any]:
    while True:
        yield function
