"""The bridge as an MCP server: what it offers to a host, and to the model in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from os import PathLike
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import attrs
from msgspec import Meta

from lmbridge.agent.events import ReasoningDelta, RoundStarted, TextDelta, ToolCallStarted
from lmbridge.agent.runs import RunStream
from lmbridge.agent.tools import Tool
from lmbridge.agent.toolset import Fault, Toolset
from lmbridge.client import LLMClient
from lmbridge.client.stream import ReplyStream, collect
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.mcp.bridge import answers
from lmbridge.mcp.dynamic import DynamicAutonomousAgent
from lmbridge.mcp.sdk.server_session import Answer, Report

logger = logging.getLogger("lmbridge.mcp")

_EACH: Final = 0.5
"""Seconds between two notifications of progress within an answer."""
_USAGE: Final = {"include_usage": True}

T = TypeVar("T")
Positive = Annotated[int, Meta(ge=1)]
Model = Annotated[
    str | None,
    "Which model answers, one of `list_models`. Default: the bridge's own default, or whatever the server has loaded.",
]
MaxTokens = Annotated[Positive | None, "Tokens after which the answer is cut off. Default: the model server decides."]
Temperature = Annotated[
    Annotated[float, Meta(ge=0)] | None,
    "0 for the likeliest words, about 0.7 for variety. Default: the model server's.",
]
Stop = Annotated[list[str] | None, "Texts before which the answer ends. Default: none."]
Task = Annotated[
    str, Meta(min_length=1), "What to do, with all that has to be known: the model sees nothing else of this chat."
]
MaxRounds = Annotated[Positive | None, "How often the model may be asked; each round may call tools. Default: 25."]
RoundTokens = Annotated[Positive | None, "Tokens of each reply of the model. Default: what fits, at most 8192."]
OnMcpError = Annotated[
    Literal["raise", "continue"],
    "If a server cannot be started: 'raise' fails, 'continue' goes on with the tools of the others and says so.",
]


class Progress:
    """Tells the caller of a call how far it is.

    Args:
        report: Sends a notification; None if the caller wants none.
    """

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._count = 0
        self._next = 0.0

    async def step(self, message: str) -> None:
        """Tells of something that happened."""
        self._count += 1
        if self._report is not None:
            self._next = asyncio.get_running_loop().time() + _EACH
            await self._report(self._count, message)

    async def tick(self, message: str) -> None:
        """Counts one more of something that happens often, and tells of it now and then."""
        if asyncio.get_running_loop().time() >= self._next:
            await self.step(message)
        else:
            self._count += 1


_Function = Callable[..., Awaitable[Answer]]
_progress: ContextVar[Progress] = ContextVar("progress")
"""That of the call that is being made."""


class Bridge:
    """The ten tools, with the client and the agent behind them. One serves any number of calls at a time.

    Args:
        client: Of the model server.
        agent: For tasks that need MCP servers. Both stay their owner's to close; `opened` has them of its own.
    """

    instructions = (
        "Language models on the user's own machine. chat_completion asks one; the autonomous tools give one a task "
        "and the tools of MCP servers. Models are slow here: ask for short answers, and for one thing at a time."
    )

    def __init__(self, client: LLMClient, agent: DynamicAutonomousAgent) -> None:
        self._client, self._agent = client, agent
        self.tools = [_tool(function, title, **hints) for function, title, hints in self._offered()]
        self._toolset = Toolset(self.tools)
        self._functions: dict[str, _Function] = {tool.name: tool.function for tool in self.tools}

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        api_base: str | None = None,
        model: str | None = None,
        *,
        config_path: str | PathLike[str] | None = None,
    ) -> AsyncIterator[Self]:
        """A bridge with a client and an agent of its own, which are closed in the end.

        Args:
            api_base: As for `LLMClient`; its key comes from the environment.
            model: As for `LLMClient`.
            config_path: As for `DynamicAutonomousAgent`.

        Raises:
            LLMValidationError: an argument, or a variable of the environment, cannot be right.
        """
        async with (
            LLMClient(api_base, model, limits="auto") as client,
            DynamicAutonomousAgent(client, config_path=config_path) as agent,
        ):
            yield cls(client, agent)

    async def call(self, name: str, arguments: Mapping[str, Any], report: Report | None = None) -> Answer:
        """Calls one of the tools; what goes wrong is an answer as well.

        Args:
            name: Of a tool that there is.
            arguments: As they were sent.
            report: Sends a notification of progress, if the caller wants it.
        """
        read = self._toolset.read({"function": {"name": name, "arguments": dict(arguments)}})
        if isinstance(read, Fault):
            return Answer([read.text], is_error=True)
        progress = Progress(report)
        _progress.set(progress)
        await progress.step("started")
        try:
            answer = await self._functions[name](**read.arguments)
        except LLMError as error:
            return answers.failure(error)
        except Exception as error:  # a bug: the host is told, and goes on being served
            logger.exception("%s failed in a way that is a bug of lmbridge", name)
            return Answer([f"{name} failed: {type(error).__name__}: {error}"], is_error=True)
        return answers.compared(answer, read.arguments.get("model"))

    # The tools. What their docstrings and annotations say is for the model that calls them.

    async def health_check(self) -> Answer:
        """Tells whether the model server is there and serves requests."""
        base = self._client.api_base
        is_there = await self._client.health_check()
        told = "serves requests." if is_there else "does not answer, or is still loading. Is it started, and there?"
        return Answer([f"The model server at {base} {told}"], {"healthy": is_there, "api_base": base})

    async def list_models(self) -> Answer:
        """Lists the models of the model server, by the names that the other tools take."""
        return answers.names("models", await self._client.list_models(), "The model server has no models.")

    async def chat_completion(
        self,
        *,
        prompt: Annotated[str | None, "What to say to the model. Give this, or `messages`, or both."] = None,
        messages: Annotated[
            list[dict[str, Any]] | None,
            "A chat so far, oldest first: objects with `role` (system, user or assistant) and `content`. "
            "`prompt` is added to it as what the user says last.",
        ] = None,
        system_prompt: Annotated[str | None, "How the model is to behave, said before everything else."] = None,
        model: Model = None,
        max_tokens: MaxTokens = None,
        temperature: Temperature = None,
        stop: Stop = None,
    ) -> Answer:
        """Asks a local language model for an answer.

        It remembers nothing from call to call: say all that it has to know.
        """
        if prompt is None and not messages:
            raise LLMValidationError(
                "neither prompt nor messages is given", hint="give prompt: what to say to the model"
            )
        chat = [*([{"role": "system", "content": system_prompt}] if system_prompt else []), *(messages or ())]
        if prompt is not None:
            chat.append({"role": "user", "content": prompt})
        params = _given(max_tokens=max_tokens, temperature=temperature, stop=stop)
        return answers.completion(
            await _whole(self._client.chat_completion(chat, model=model, stream=True, stream_options=_USAGE, **params))
        )

    async def text_completion(
        self,
        *,
        prompt: Annotated[str, "The text that is to go on."],
        model: Model = None,
        max_tokens: MaxTokens = None,
        temperature: Temperature = None,
        stop: Stop = None,
    ) -> Answer:
        """Lets a local language model continue a text, as it stands: no chat, no instructions."""
        params = _given(max_tokens=max_tokens, temperature=temperature, stop=stop)
        return answers.completion(
            await _whole(
                self._client.text_completion(prompt, model=model, stream=True, stream_options=_USAGE, **params)
            )
        )

    async def generate_embeddings(
        self,
        *,
        input: Annotated[str | list[str], "A text, or a list of texts; none empty."],  # noqa: A002 - the API's own name
        model: Annotated[
            str | None, "An embedding model, one of `list_models`. Default: as for the other tools."
        ] = None,
    ) -> Answer:
        """Turns texts into embedding vectors, one for each text, in their order."""
        return answers.embeddings(await self._client.embeddings(input, model=model))

    async def create_response(
        self,
        *,
        input: Annotated[str, "What to say to the model."],  # noqa: A002 - the API's own name
        instructions: Annotated[str | None, "How the model is to behave. It holds for this response only."] = None,
        previous_response_id: Annotated[
            str | None,
            "The id that an earlier response ended with, to go on from there (LM Studio can, llama.cpp cannot). "
            "Default: begin anew.",
        ] = None,
        model: Model = None,
        max_output_tokens: MaxTokens = None,
        temperature: Temperature = None,
    ) -> Answer:
        """Asks a local language model; where the server keeps its answers, a later call can go on from one."""
        params = _given(instructions=instructions, max_output_tokens=max_output_tokens, temperature=temperature)
        return answers.response(
            await _whole(
                self._client.create_response(
                    input, model=model, previous_response_id=previous_response_id, stream=True, **params
                )
            ),
            max_output_tokens,
        )

    async def autonomous_with_mcp(
        self,
        *,
        mcp_name: Annotated[str, "The MCP server, one of `list_available_mcps`."],
        task: Task,
        max_rounds: MaxRounds = None,
        max_tokens: RoundTokens = None,
        model: Model = None,
    ) -> Answer:
        """Gives a local language model a task and the tools of one MCP server, and returns its final answer.

        The model calls the tools by itself, as often as it needs to.
        """
        return await _answer_of(
            self._agent.autonomous_with_mcp(
                mcp_name, task, max_rounds=max_rounds, max_tokens=max_tokens or "auto", model=model, stream=True
            )
        )

    async def autonomous_with_multiple_mcps(
        self,
        *,
        mcp_names: Annotated[list[str], Meta(min_length=1), "The MCP servers, some of `list_available_mcps`."],
        task: Task,
        on_mcp_error: OnMcpError = "raise",
        max_rounds: MaxRounds = None,
        max_tokens: RoundTokens = None,
        model: Model = None,
    ) -> Answer:
        """Gives a local language model a task and the tools of several MCP servers, and returns its final answer.

        The model calls the tools by itself, as often as it needs to.
        """
        return await _answer_of(
            self._agent.autonomous_with_multiple_mcps(
                mcp_names,
                task,
                on_mcp_error=on_mcp_error,
                max_rounds=max_rounds,
                max_tokens=max_tokens or "auto",
                model=model,
                stream=True,
            )
        )

    async def autonomous_discover_and_execute(
        self,
        *,
        task: Task,
        on_mcp_error: OnMcpError = "continue",
        max_rounds: MaxRounds = None,
        max_tokens: RoundTokens = None,
        model: Model = None,
    ) -> Answer:
        """Gives a local language model a task and the tools of all MCP servers, and returns its final answer.

        The model calls the tools by itself, as often as it needs to.
        """
        return await _answer_of(
            self._agent.autonomous_discover_and_execute(
                task,
                on_mcp_error=on_mcp_error,
                max_rounds=max_rounds,
                max_tokens=max_tokens or "auto",
                model=model,
                stream=True,
            )
        )

    async def list_available_mcps(self) -> Answer:
        """Lists the MCP servers that the autonomous tools can use; it starts none of them."""
        return answers.names("mcps", await self._agent.list_available_mcps(), "No MCP server is configured.")

    def _offered(self) -> list[tuple[_Function, str, dict[str, bool]]]:
        """The tools, in the order in which they are listed, what a host calls them, and what they may do."""
        looks = {"readOnlyHint": True, "openWorldHint": False}
        # A generation changes what the model server has loaded, and no more than that.
        generates = {"readOnlyHint": False, "destructiveHint": False, "idempotentHint": False, "openWorldHint": False}
        # It may do whatever the tools of the servers do.
        acts = {"readOnlyHint": False, "destructiveHint": True, "idempotentHint": False, "openWorldHint": True}
        return [
            (self.health_check, "Is the model server there?", looks),
            (self.list_models, "List local models", looks),
            (self.chat_completion, "Ask a local model", generates),
            (self.text_completion, "Continue a text", generates),
            (self.generate_embeddings, "Embed texts", generates | {"idempotentHint": True}),
            (self.create_response, "Ask a local model, or go on from its answer", generates),
            (self.autonomous_with_mcp, "Task for a local model with an MCP server", acts),
            (self.autonomous_with_multiple_mcps, "Task for a local model with MCP servers", acts),
            (self.autonomous_discover_and_execute, "Task for a local model with all MCP servers", acts),
            (self.list_available_mcps, "List MCP servers", looks),
        ]


def _tool(function: _Function, title: str, **hints: bool) -> Tool:
    return attrs.evolve(Tool.from_function(function), annotations={"title": title, **hints})


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


async def _whole(opening: Awaitable[ReplyStream[Any, T]]) -> T:
    """The whole reply of a stream. A cancel closes it: the server stops generating, which it would not otherwise."""
    progress = _progress.get()
    async with await opening as stream:
        pieces = 0
        async for _ in stream:
            pieces += 1
            await progress.tick(f"the model is answering: {pieces} pieces so far")
    reply: T = await collect(stream)
    return reply


async def _answer_of(opening: Awaitable[RunStream]) -> Answer:
    """What a run comes to. A cancel cancels it."""
    progress = _progress.get()
    where = ""
    async with await opening as events:
        async for event in events:
            match event:
                case RoundStarted(round=number):
                    where = f"round {number}"
                    await progress.step(where)
                case ToolCallStarted(call=call):
                    await progress.step(f"{where}: calling {call.name}")
                case TextDelta() | ReasoningDelta():
                    await progress.tick(f"{where}: the model is answering")
        return answers.run(await events.handle.result())
