"""The bridge: the ten tools that lmbridge offers to an MCP host, and to the model that runs in it.

The host receives the docstrings of the tool methods as tool descriptions, and the texts in their annotations as
parameter descriptions. A model reads them, so they are short and say only what is needed to make a call.

A configuration may contain the bridge itself, because its host reads the same file. `McpHub` leaves such an entry out
(`ServerSpec.is_lmbridge`), so that the bridge does not connect to itself.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from os import PathLike
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import attrs
from msgspec import Meta

from lmbridge.agent.events import ReasoningDelta, RoundStarted, TextDelta, ToolCallStarted
from lmbridge.agent.runs import RunStream
from lmbridge.agent.tools import Tool
from lmbridge.agent.toolset import InvalidCall, Toolset
from lmbridge.client import LLMClient
from lmbridge.client.collecting import collect
from lmbridge.client.reply_stream import ReplyStream
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.mcp.bridge import answers
from lmbridge.mcp.bridge.progress import HostProgressReporter, current_progress
from lmbridge.mcp.dynamic import DynamicAutonomousAgent
from lmbridge.mcp.sdk.server_session import HostAnswer, ReportProgress

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

T = TypeVar("T")

_INCLUDE_USAGE: Final = {"include_usage": True}

# The types of the tools' arguments, each with the description that a model reads.

PositiveInt = Annotated[int, Meta(ge=1)]
ModelArgument = Annotated[
    str | None,
    "The model that answers, one of those from `list_models`. Default: the bridge's default model, or the model that "
    "the server has loaded.",
]
MaxTokensArgument = Annotated[
    PositiveInt | None, "The answer is cut off after this many tokens. Default: the model server decides."
]
TemperatureArgument = Annotated[
    Annotated[float, Meta(ge=0)] | None,
    "0 picks the likeliest words, about 0.7 gives variety. Default: the model server decides.",
]
StopArgument = Annotated[list[str] | None, "The answer ends before any of these texts. Default: none."]
TaskArgument = Annotated[
    str,
    Meta(min_length=1),
    "What the model should do, with everything it needs to know: it cannot see this conversation.",
]
MaxRoundsArgument = Annotated[
    PositiveInt | None, "The maximum number of rounds. In each round the model may call tools. Default: 25."
]
RoundTokensArgument = Annotated[
    PositiveInt | None, "The maximum number of tokens in each reply. Default: as many as fit, at most 8192."
]
OnMcpErrorArgument = Annotated[
    Literal["raise", "continue"],
    "What happens if a server cannot be started: 'raise' fails, 'continue' goes on with the tools of the other servers "
    "and says which are missing.",
]

_ToolFunction = Callable[..., Awaitable[HostAnswer]]


class Bridge:
    """The ten tools, and the client and the agent that they use. One bridge serves any number of concurrent calls.

    Args:
        client: The client of the model server. The caller closes it.
        agent: The agent for tasks that use MCP servers. The caller closes it. `Bridge.opened` makes and closes both.
    """

    instructions = (
        "Language models that run on the user's machine. chat_completion asks a model. The autonomous tools give a "
        "model a task and the tools of MCP servers. These models are slow: ask for short answers, one thing at a time."
    )
    """The text about the tools as a whole that a host shows its model."""

    def __init__(self, client: LLMClient, agent: DynamicAutonomousAgent) -> None:
        self._client, self._agent = client, agent
        self.tools: list[Tool] = [_make_tool(function, title, **hints) for function, title, hints in self._tool_table()]
        """The tools, in the order in which a host lists them."""
        self._toolset = Toolset(self.tools)
        self._functions: dict[str, _ToolFunction] = {tool.name: tool.function for tool in self.tools}

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        api_base: str | None = None,
        model: str | None = None,
        *,
        config_path: str | PathLike[str] | None = None,
    ) -> AsyncIterator[Self]:
        """Yields a bridge, and closes its client and its agent at the end of the `async with` block.

        Args:
            api_base: The URL of the model server; see `LLMClient`. The API key comes from the environment.
            model: The model for calls that do not name one; see `LLMClient`.
            config_path: The configuration file with the MCP servers; see `DynamicAutonomousAgent`.

        Raises:
            LLMValidationError: An argument or an environment variable is not valid.
        """
        async with (
            LLMClient(api_base, model, limits="auto") as client,
            DynamicAutonomousAgent(client, config_path=config_path) as agent,
        ):
            yield cls(client, agent)

    async def call(self, name: str, arguments: Mapping[str, Any], report: ReportProgress | None = None) -> HostAnswer:
        """Calls a tool. A failure is returned as an answer with `is_error` instead of being raised.

        Args:
            name: The name of one of `tools`.
            arguments: The arguments as the host sent them; they are validated here.
            report: Sends a progress notification. Default: None, which reports nothing.
        """
        (call,) = await self._toolset.read_all([{"function": {"name": name, "arguments": dict(arguments)}}])
        if isinstance(call, InvalidCall):
            return HostAnswer([call.text], is_error=True)
        progress = HostProgressReporter(report)
        current_progress.set(progress)
        await progress.step("started")
        try:
            answer = await self._functions[name](**call.arguments)
        except LLMError as error:
            return answers.from_error(error)
        except Exception as error:
            # A bug of lmbridge must not end the process: the host sees the error and can make further calls.
            logger.exception("the tool %s failed because of a bug in lmbridge", name)
            return HostAnswer([f"{name} failed: {type(error).__name__}: {error}"], is_error=True)
        return answers.with_model_note(answer, call.arguments.get("model"))

    # The tools. Their docstrings and the annotations of their parameters are read by the host's model.

    async def health_check(self) -> HostAnswer:
        """Checks whether the model server is running and accepts requests."""
        api_base = self._client.api_base
        is_healthy = await self._client.health_check()
        state = (
            "accepts requests."
            if is_healthy
            else "does not answer or is still loading. Check that it is running and that its address is right."
        )
        return HostAnswer([f"The model server at {api_base} {state}"], {"healthy": is_healthy, "api_base": api_base})

    async def list_models(self) -> HostAnswer:
        """Lists the names of the models on the model server. The other tools accept these names as `model`."""
        return answers.from_names("models", await self._client.list_models(), "The model server has no models.")

    async def chat_completion(
        self,
        *,
        prompt: Annotated[str | None, "The message for the model. Give `prompt`, `messages`, or both."] = None,
        messages: Annotated[
            list[dict[str, Any]] | None,
            "An earlier conversation, oldest message first: objects with `role` (system, user or assistant) and "
            "`content`. `prompt` is added at the end as a user message.",
        ] = None,
        system_prompt: Annotated[str | None, "How the model should behave. It comes before all messages."] = None,
        model: ModelArgument = None,
        max_tokens: MaxTokensArgument = None,
        temperature: TemperatureArgument = None,
        stop: StopArgument = None,
    ) -> HostAnswer:
        """Asks a local language model for an answer.

        The model remembers nothing between calls, so include everything it needs to know.
        """
        if prompt is None and not messages:
            raise LLMValidationError(
                "neither prompt nor messages is given", hint="give prompt, the message for the model"
            )
        chat = [*([{"role": "system", "content": system_prompt}] if system_prompt else []), *(messages or ())]
        if prompt is not None:
            chat.append({"role": "user", "content": prompt})
        params = _without_unset(max_tokens=max_tokens, temperature=temperature, stop=stop)
        return answers.from_completion(
            await _read_whole_reply(
                self._client.chat_completion(chat, model=model, stream=True, stream_options=_INCLUDE_USAGE, **params)
            )
        )

    async def text_completion(
        self,
        *,
        prompt: Annotated[str, "The text to continue."],
        model: ModelArgument = None,
        max_tokens: MaxTokensArgument = None,
        temperature: TemperatureArgument = None,
        stop: StopArgument = None,
    ) -> HostAnswer:
        """Has a local language model continue a text. The text is sent unchanged, with no chat around it."""
        params = _without_unset(max_tokens=max_tokens, temperature=temperature, stop=stop)
        return answers.from_completion(
            await _read_whole_reply(
                self._client.text_completion(prompt, model=model, stream=True, stream_options=_INCLUDE_USAGE, **params)
            )
        )

    async def generate_embeddings(
        self,
        *,
        input: Annotated[str | list[str], "A text or a list of texts. Empty texts are not allowed."],  # noqa: A002 - the API's own name
        model: Annotated[
            str | None, "An embedding model, one of those from `list_models`. Default: as for the other tools."
        ] = None,
    ) -> HostAnswer:
        """Turns texts into embedding vectors, one for each text, in the same order."""
        return answers.from_embeddings(await self._client.embeddings(input, model=model))

    async def create_response(
        self,
        *,
        input: Annotated[str, "The message for the model."],  # noqa: A002 - the API's own name
        instructions: Annotated[str | None, "How the model should behave in this response."] = None,
        previous_response_id: Annotated[
            str | None,
            "The id of an earlier response, to continue from it. LM Studio supports this, llama.cpp does not. "
            "Default: a new conversation.",
        ] = None,
        model: ModelArgument = None,
        max_output_tokens: MaxTokensArgument = None,
        temperature: TemperatureArgument = None,
    ) -> HostAnswer:
        """Asks a local language model for a response that a later call can continue, if the server stores responses."""
        params = _without_unset(instructions=instructions, max_output_tokens=max_output_tokens, temperature=temperature)
        return answers.from_response(
            await _read_whole_reply(
                self._client.create_response(
                    input, model=model, previous_response_id=previous_response_id, stream=True, **params
                )
            ),
            max_output_tokens,
        )

    async def autonomous_with_mcp(
        self,
        *,
        mcp_name: Annotated[str, "The MCP server, one of those from `list_available_mcps`."],
        task: TaskArgument,
        max_rounds: MaxRoundsArgument = None,
        max_tokens: RoundTokensArgument = None,
        model: ModelArgument = None,
    ) -> HostAnswer:
        """Gives a local language model a task and the tools of one MCP server, and returns its final answer.

        The model decides which tools to call, and how often.
        """
        return await _run_to_answer(
            self._agent.autonomous_with_mcp(
                mcp_name, task, max_rounds=max_rounds, max_tokens=max_tokens or "auto", model=model, stream=True
            )
        )

    async def autonomous_with_multiple_mcps(
        self,
        *,
        mcp_names: Annotated[list[str], Meta(min_length=1), "The MCP servers, from those of `list_available_mcps`."],
        task: TaskArgument,
        on_mcp_error: OnMcpErrorArgument = "raise",
        max_rounds: MaxRoundsArgument = None,
        max_tokens: RoundTokensArgument = None,
        model: ModelArgument = None,
    ) -> HostAnswer:
        """Gives a local language model a task and the tools of several MCP servers, and returns its final answer.

        The model decides which tools to call, and how often.
        """
        return await _run_to_answer(
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
        task: TaskArgument,
        on_mcp_error: OnMcpErrorArgument = "continue",
        max_rounds: MaxRoundsArgument = None,
        max_tokens: RoundTokensArgument = None,
        model: ModelArgument = None,
    ) -> HostAnswer:
        """Gives a local language model a task and the tools of all MCP servers, and returns its final answer.

        The model decides which tools to call, and how often.
        """
        return await _run_to_answer(
            self._agent.autonomous_discover_and_execute(
                task,
                on_mcp_error=on_mcp_error,
                max_rounds=max_rounds,
                max_tokens=max_tokens or "auto",
                model=model,
                stream=True,
            )
        )

    async def list_available_mcps(self) -> HostAnswer:
        """Lists the names of the MCP servers that the autonomous tools can use. It does not start them."""
        return answers.from_names("mcps", await self._agent.list_available_mcps(), "No MCP server is configured.")

    def _tool_table(self) -> list[tuple[_ToolFunction, str, dict[str, bool]]]:
        """Returns each tool's function, title and MCP hints, in the order in which the tools are listed."""
        reads = {"readOnlyHint": True, "openWorldHint": False}
        # A generation may load a model on the server and changes nothing else.
        generates = {"readOnlyHint": False, "destructiveHint": False, "idempotentHint": False, "openWorldHint": False}
        # A run may do whatever the tools of its MCP servers can do.
        acts = {"readOnlyHint": False, "destructiveHint": True, "idempotentHint": False, "openWorldHint": True}
        return [
            (self.health_check, "Check the model server", reads),
            (self.list_models, "List local models", reads),
            (self.chat_completion, "Ask a local model", generates),
            (self.text_completion, "Continue a text", generates),
            (self.generate_embeddings, "Embed texts", generates | {"idempotentHint": True}),
            (self.create_response, "Ask a local model, or continue from a response", generates),
            (self.autonomous_with_mcp, "Run a task with one MCP server", acts),
            (self.autonomous_with_multiple_mcps, "Run a task with several MCP servers", acts),
            (self.autonomous_discover_and_execute, "Run a task with all MCP servers", acts),
            (self.list_available_mcps, "List MCP servers", reads),
        ]


def _make_tool(function: _ToolFunction, title: str, **hints: bool) -> Tool:
    return attrs.evolve(Tool.from_function(function), annotations={"title": title, **hints})


def _without_unset(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


async def _read_whole_reply(opening: Awaitable[ReplyStream[Any, T]]) -> T:
    """Reads a stream to its end and returns the complete reply.

    The tools stream even though they return a whole answer: when a client disconnects, most servers stop generating
    only if the reply is a stream.
    """
    progress = current_progress.get()
    async with await opening as stream:
        pieces = 0
        async for _ in stream:
            pieces += 1
            await progress.tick(f"the model is answering: {pieces} pieces so far")
    reply: T = await collect(stream)
    return reply


async def _run_to_answer(opening: Awaitable[RunStream]) -> HostAnswer:
    """Reports the progress of a run and returns its answer. A cancellation of the caller also cancels the run."""
    progress = current_progress.get()
    round_label = ""
    async with await opening as events:
        async for event in events:
            match event:
                case RoundStarted(round=number):
                    round_label = f"round {number}"
                    await progress.step(round_label)
                case ToolCallStarted(call=call):
                    await progress.step(f"{round_label}: calling {call.name}")
                case TextDelta() | ReasoningDelta():
                    await progress.tick(f"{round_label}: the model is answering")
        return answers.from_run(await events.handle.result())
