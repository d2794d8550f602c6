"""`ChatLMBridge`: a chat model of LangChain on top of an `LLMClient`.

It needs langchain-core alone, which translates messages and tools to OpenAI's form.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

try:
    from langchain_core import exceptions
    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from langchain_core.messages import (
        AIMessage,
        AIMessageChunk,
        BaseMessage,
        convert_to_openai_messages,
        message_chunk_to_message,
    )
    from langchain_core.messages.ai import UsageMetadata
    from langchain_core.messages.tool import tool_call_chunk
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool
    from langchain_core.utils.function_calling import convert_to_openai_tool
    from pydantic import Field
except ImportError as _error:
    raise ImportError("lmbridge.interop.langchain needs langchain-core: pip install 'lmbridge[langchain]'") from _error

import lmbridge.errors
from lmbridge._checks import invalid_argument
from lmbridge.client import LLMClient
from lmbridge.sync import LLMClient as SyncLLMClient
from lmbridge.sync._wrap import unwrap

__all__ = ["ChatLMBridge"]

_ERRORS: Final[tuple[tuple[type[lmbridge.errors.LLMError], type[exceptions.ModelError]], ...]] = (
    (lmbridge.errors.ContextLengthExceededError, exceptions.ContextOverflowError),
    (lmbridge.errors.LLMAuthenticationError, exceptions.ModelAuthenticationError),
    (lmbridge.errors.LLMRateLimitError, exceptions.ModelRateLimitError),
    (lmbridge.errors.ModelNotFoundError, exceptions.ModelNotFoundError),
    (lmbridge.errors.LLMTimeoutError, exceptions.ModelTimeoutError),
    (lmbridge.errors.LLMConnectionError, exceptions.ModelConnectionError),
    (lmbridge.errors.LLMStreamError, exceptions.ModelConnectionError),
    (lmbridge.errors.ModelMismatchError, exceptions.ModelError),
    (lmbridge.errors.TaskCancelledError, exceptions.ModelError),
    (lmbridge.errors.LLMResponseError, exceptions.ModelAPIError),
)
"""The class of LangChain for each error class of lmbridge. The first entry whose class an error belongs to is used."""
_CHOICES: Final[Mapping[str, str]] = {"auto": "auto", "none": "none", "any": "required", "required": "required"}
"""The choices that are not the name of a tool, in OpenAI's form. Other models of LangChain say "any" for "required"."""
_USAGE: Final[dict[str, Any]] = {"stream_options": {"include_usage": True}}


class ChatLMBridge(BaseChatModel):
    """A chat model of LangChain that asks an `LLMClient`.

    ::

        async with LLMClient() as client:
            chat = ChatLMBridge(client=client, model="qwen3-4b", params={"temperature": 0})
            print((await chat.ainvoke("What is the capital of Norway?")).content)

    Model scheduling, retries, timeouts and `model_mismatch` are those of the client. With the client of
    `lmbridge.sync`, `invoke` and `stream` work, and `ainvoke` and `astream` use threads. Errors are those of
    `langchain_core.exceptions`, such as `ModelTimeoutError`; `__cause__` is the `LLMError`, with its `partial`.
    """

    client: LLMClient | SyncLLMClient
    """The client. It has to be open as long as the model is used, and the program closes it."""
    model: str | None = None
    """The name of the model. Default: the client's model; if it has none, the server chooses."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters and options of every request, such as `temperature` or `timeout`. Default: none."""

    @property
    def _llm_type(self) -> str:
        return "lmbridge"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # LangChain reads this property in an event loop, where a blocking client must not be called.
        client: LLMClient = unwrap(self.client)
        return {"model": self.model or client.model, "api_base": client.api_base, "params": self.params}

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Returns the model with tools.

        Args:
            tools: The tools.
            tool_choice: The name of the tool that has to be called; "any", "required" or True if any of them has to be
                called; "auto" or "none"; or a dict in OpenAI's form. Default: it is not sent.
            **kwargs: Further parameters of each request.

        Raises:
            LLMValidationError: `tool_choice` is anything else.
        """
        definitions = [convert_to_openai_tool(tool) for tool in tools]
        choice = _choice_of_tool(tool_choice, [each["function"]["name"] for each in definitions])
        options = {"tool_choice": choice, **kwargs} if choice else kwargs
        return self.bind(tools=definitions, **options)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        if isinstance(self.client, SyncLLMClient):
            return await super()._agenerate(messages, stop, run_manager, **kwargs)
        with _errors_of_langchain():
            return _result(await self.client.chat_completion(**self._request(messages, stop, kwargs)))

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        if isinstance(self.client, SyncLLMClient):
            async for piece in super()._astream(messages, stop, run_manager, **kwargs):
                yield piece
            return
        with _errors_of_langchain():
            async with self.client.stream_chat(**self._request(messages, stop, kwargs, **_USAGE)) as chunks:
                async for chunk in chunks:
                    yield _piece(chunk, "delta")

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        with _errors_of_langchain():
            return _result(self._sync_client().chat_completion(**self._request(messages, stop, kwargs)))

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        with (
            _errors_of_langchain(),
            self._sync_client().stream_chat(**self._request(messages, stop, kwargs, **_USAGE)) as chunks,
        ):
            yield from (_piece(chunk, "delta") for chunk in chunks)

    def _sync_client(self) -> SyncLLMClient:
        if not isinstance(self.client, SyncLLMClient):
            hint = "use ainvoke() or astream(), or give ChatLMBridge an lmbridge.sync.LLMClient"
            raise lmbridge.errors.LLMValidationError("an asynchronous client cannot be called without await", hint=hint)
        return self.client

    def _request(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        **defaults: Any,
    ) -> Any:
        given = {**defaults, "model": self.model, **self.params, **({} if stop is None else {"stop": stop}), **kwargs}
        # The method that LangChain calls already says whether the reply is streamed.
        given.pop("stream", None)
        return {"messages": convert_to_openai_messages(messages), **given}


def _choice_of_tool(choice: object, names: Sequence[str]) -> str | dict[str, Any] | None:
    """Returns a `tool_choice` in OpenAI's form, or None if it is not sent. It is read as langchain-openai reads it.

    Raises:
        LLMValidationError: The choice cannot be read.
    """
    if choice is None or choice is False or isinstance(choice, dict):
        return choice or None
    if choice is True:
        return "required"
    if isinstance(choice, str):
        if choice in names:
            return {"type": "function", "function": {"name": choice}}
        if choice in _CHOICES:
            return _CHOICES[choice]
    expected = "the name of one of the tools, 'auto', 'none', 'any', 'required', a bool, or a dict in OpenAI's form"
    raise invalid_argument("tool_choice", expected, choice)


@contextmanager
def _errors_of_langchain() -> Iterator[None]:
    """Converts the errors of lmbridge to LangChain's.

    An error without a counterpart there, such as a plain `LLMValidationError`, is raised unchanged.
    """
    try:
        yield
    except lmbridge.errors.LLMError as error:
        kind = next((after for before, after in _ERRORS if isinstance(error, before)), None)
        if isinstance(error, lmbridge.errors.LLMResponseError) and 400 <= (error.status or 0) < 500:
            kind = exceptions.ModelInvalidRequestError if kind is exceptions.ModelAPIError else kind
        if kind is None:
            raise
        raise kind(str(error)) from error


def _result(reply: Any) -> ChatResult:
    piece = _piece(reply, "message")
    message = message_chunk_to_message(piece.message)
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=piece.generation_info)])


def _piece(reply: Mapping[str, Any], part: Literal["delta", "message"]) -> ChatGenerationChunk:
    """Returns a chunk of a stream, or a whole reply, in LangChain's form. The last chunk may have only the usage."""
    choice: Mapping[str, Any] = next(iter(reply["choices"]), {})
    message: Mapping[str, Any] = choice.get(part) or {}
    calls = [
        tool_call_chunk(
            name=call["function"].get("name"),
            args=call["function"].get("arguments"),
            id=call.get("id"),
            index=call.get("index", place),
        )
        for place, call in enumerate(message.get("tool_calls") or ())
    ]
    reason, usage = choice.get("finish_reason"), reply.get("usage") or {}
    metadata = {"finish_reason": reason, "model_name": reply.get("model") or ""} if reason else {}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    sent, written = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    message_chunk = AIMessageChunk(
        content=message.get("content") or "",
        tool_call_chunks=calls,
        additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
        response_metadata=metadata,
        usage_metadata=UsageMetadata(input_tokens=sent, output_tokens=written, total_tokens=sent + written)
        if usage
        else None,
    )
    return ChatGenerationChunk(message=message_chunk, generation_info=metadata or None)
