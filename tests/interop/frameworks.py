"""The frameworks, each behind the same few methods, so that one test can ask all of them.

They are extras of lmbridge; where they are not installed, their tests are skipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from importlib import import_module
from typing import Any, ClassVar, Final

import pytest
from pydantic import BaseModel

from lmbridge import LLMClient


class City(BaseModel):
    """A city."""

    name: str
    country: str


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


class Framework(ABC):
    """A framework whose model asks an `LLMClient`."""

    package: ClassVar[str]
    module: ClassVar[str]
    """The module of lmbridge for it."""
    errors: ClassVar[tuple[str, str, str, str, str]]
    """Its errors for a prompt that is too long, 429, 401, a time limit, and a broken connection: module and name."""

    def __init__(self) -> None:
        self.framework: Final[Any] = pytest.importorskip(self.package, reason=f"needs the extra for {self.package}")
        # It is imported here, because importing reads files, which nothing may do in an event loop.
        self.interop: Final[Any] = import_module(self.module)

    def error(self, place: int) -> type[Exception]:
        module, _, name = self.errors[place].rpartition(".")
        kind: type[Exception] = getattr(import_module(module), name)
        return kind

    @abstractmethod
    async def ask(self, client: LLMClient, question: str, tools: list[Callable[..., Any]] | None = None) -> str:
        """Asks, calls the tools that the model calls, and returns the answer."""

    @abstractmethod
    def stream(self, client: LLMClient, question: str) -> AsyncGenerator[str, None]:
        """Yields the pieces of the answer."""

    @abstractmethod
    async def city(self, client: LLMClient, question: str) -> City:
        """Asks for structured output."""


class LangChain(Framework):
    package = "langchain_core"
    module = "lmbridge.interop.langchain"
    errors = (
        "langchain_core.exceptions.ContextOverflowError",
        "langchain_core.exceptions.ModelRateLimitError",
        "langchain_core.exceptions.ModelAuthenticationError",
        "langchain_core.exceptions.ModelTimeoutError",
        "langchain_core.exceptions.ModelConnectionError",
    )

    def chat(self, client: Any, **options: Any) -> Any:
        return self.interop.ChatLMBridge(client=client, **options)

    async def ask(self, client: LLMClient, question: str, tools: list[Callable[..., Any]] | None = None) -> str:
        messages: list[Any] = [("user", question)]
        chat = self.chat(client, params={"temperature": 0, "max_tokens": 64})
        if tools:
            make_tool = import_module("langchain_core.tools").tool
            by_name = {tool.name: tool for tool in map(make_tool, tools)}
            reply = await chat.bind_tools(list(by_name.values()), tool_choice="any").ainvoke(messages)
            results = [await by_name[call["name"]].ainvoke(call) for call in reply.tool_calls]
            messages += [reply, *results]
        return str((await chat.ainvoke(messages)).content)

    async def stream(self, client: LLMClient, question: str) -> AsyncGenerator[str, None]:
        async for piece in self.chat(client, params={"temperature": 0, "max_tokens": 24}).astream(question):
            if piece.content:
                yield str(piece.content)

    async def city(self, client: LLMClient, question: str) -> City:
        city = await self.chat(client, params={"max_tokens": 128}).with_structured_output(City).ainvoke(question)
        assert isinstance(city, City)
        return city


class PydanticAI(Framework):
    package = "pydantic_ai"
    module = "lmbridge.interop.pydantic_ai"
    errors = (
        "pydantic_ai.exceptions.ModelHTTPError",
        "pydantic_ai.exceptions.ModelHTTPError",
        "pydantic_ai.exceptions.ModelHTTPError",
        "pydantic_ai.exceptions.ModelAPIError",
        "pydantic_ai.exceptions.ModelAPIError",
    )

    def agent(self, client: LLMClient, **options: Any) -> Any:
        model = self.interop.LMBridgeModel(client)
        settings = {"temperature": 0, "max_tokens": 128}
        return self.framework.Agent(model, model_settings=settings, **options)

    async def ask(self, client: LLMClient, question: str, tools: list[Callable[..., Any]] | None = None) -> str:
        return str((await self.agent(client, tools=tools or []).run(question)).output)

    async def stream(self, client: LLMClient, question: str) -> AsyncGenerator[str, None]:
        async with self.agent(client).run_stream(question) as result:
            async for text in result.stream_text(delta=True, debounce_by=None):
                yield text

    async def city(self, client: LLMClient, question: str) -> City:
        city = (await self.agent(client, output_type=City).run(question)).output
        assert isinstance(city, City)
        return city


class OpenAIAgents(Framework):
    package = "agents"
    module = "lmbridge.interop.openai_agents"
    errors = (
        "openai.BadRequestError",
        "openai.RateLimitError",
        "openai.AuthenticationError",
        "openai.APITimeoutError",
        "openai.APIConnectionError",
    )

    def agent(self, client: LLMClient, **options: Any) -> Any:
        self.framework.set_tracing_disabled(True)
        model = self.interop.LMBridgeModel(client)
        settings = self.framework.ModelSettings(temperature=0, max_tokens=128)
        return self.framework.Agent(name="Test", model=model, model_settings=settings, **options)

    async def ask(self, client: LLMClient, question: str, tools: list[Callable[..., Any]] | None = None) -> str:
        functions = [self.framework.function_tool(tool) for tool in tools or ()]
        return str((await self.framework.Runner.run(self.agent(client, tools=functions), question)).final_output)

    async def stream(self, client: LLMClient, question: str) -> AsyncGenerator[str, None]:
        result = self.framework.Runner.run_streamed(self.agent(client), question)
        try:
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    yield event.data.delta
        finally:
            # The run is a task of its own, which leaving its events does not end.
            result.cancel()

    async def city(self, client: LLMClient, question: str) -> City:
        result = await self.framework.Runner.run(self.agent(client, output_type=City), question)
        assert isinstance(result.final_output, City)
        return result.final_output


FRAMEWORKS: Final[list[type[Framework]]] = [LangChain, PydanticAI, OpenAIAgents]
