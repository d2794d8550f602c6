"""`DynamicAutonomousAgent`: an agent whose runs get their tools from MCP servers.

A run names the servers that it needs, and they are started when the run begins. The alternative, a fixed list of
servers for the whole agent, would start servers that no run ever uses. The servers keep running when the run ends:
starting a server takes seconds, so concurrent and later runs share the same sessions through one `McpHub`.

What the run and its model learn about servers that could not be started is decided in `server_selection`.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, Unpack, overload

from lmbridge._checks import wrong_type
from lmbridge._copying import NotCopyable
from lmbridge._pending_call import explains_missing_await
from lmbridge.agent.agent import Agent, AnyJournal
from lmbridge.agent.chat_client import ChatClient, ChatClientPool
from lmbridge.agent.result import ENDINGS, RunResult
from lmbridge.agent.runs import RunHandle, RunStream
from lmbridge.agent.sampling import SamplingOptions
from lmbridge.agent.settings import MaxTokens, Task
from lmbridge.agent.tool_sources import OpenTools
from lmbridge.client import LLMClient
from lmbridge.errors import (
    LLMValidationError,
    MCPError,
    RunIncompleteError,
    TaskCancelledError,
)
from lmbridge.mcp.config.server_spec import HeadersFunction
from lmbridge.mcp.options import (
    AgentOptions,
    CompleteRunOptions,
    LiteralFalse,
    LiteralTrue,
    MultiServerRunOptions,
    OnMcpError,
    RunOptions,
    check_on_mcp_error,
    check_server_name,
    check_server_names,
)
from lmbridge.mcp.server_selection import ServerSelection
from lmbridge.mcp.servers.elicitation import OnElicitation
from lmbridge.mcp.servers.events import McpEvent
from lmbridge.mcp.servers.hub import McpHub

if TYPE_CHECKING:
    from lmbridge.agent.journal import Journal

_CONFIG_HINT: Final = (
    "pass the path of the configuration file: DynamicAutonomousAgent(config_path='mcp.json');"
    " write a dict to a file first"
)
_CLOSED_MESSAGE: Final = "the run was cancelled because its agent was closed"


class DynamicAutonomousAgent(NotCopyable):
    """An agent whose runs name the MCP servers that they need.

    A server is started when the first run needs it, and shared by all runs. One agent serves any number of concurrent
    runs in one event loop. Use it with `async with`, or call `close` when you no longer need it::

        async with DynamicAutonomousAgent() as agent:
            print(await agent.list_available_mcps())
            print(await agent.autonomous_with_mcp("time", "What time is it in Tokyo?"))

    Args:
        client: An `LLMClient` or an `LLMClientPool`, which the caller closes. Default: a client that is configured from
            the environment, has `limits="auto"`, and is closed with the agent.
        config_path: The configuration file with the MCP servers. Default: the file that the environment variable
            `MCP_JSON_PATH` names, or else the first that exists of `./.mcp.json` (only if it is trusted),
            `~/.lmstudio/mcp.json` and `~/.mcp.json`.
        trust_project: Whether `./.mcp.json` may be used. Default: False, because that file starts programs that the
            author of the current directory has chosen.
        connect_timeout: The time limit for connecting to a server and listing its tools, in seconds. The configuration
            file can set another value for a server. Default: 30; more for `npx`, `uvx` and similar programs, see
            `McpHub`.
        on_mcp_event: A function that is called with each event of a server: changes of its state and of its tools, log
            messages, and the progress of calls. Default: None.
        mcp_headers: A mapping from the names of HTTP servers to functions that return additional headers for them; see
            `headers` of `McpHub`. Default: None, which adds no headers.
        on_elicitation: A function, async or plain, that asks the user the question of a server (an `Elicitation`) and
            returns the answer, as for `McpHub`. Default: None, which declines every question.
        **agent_options: The options of `Agent`. The `tools` among them are available in each run, in addition to the
            tools of the servers.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    _instead_of_a_copy = "pass the agent itself on, and create another one in each process"

    def __init__(
        self,
        client: ChatClient | ChatClientPool | None = None,
        *,
        config_path: str | os.PathLike[str] | None = None,
        trust_project: bool = False,
        connect_timeout: float | None = None,
        on_mcp_event: Callable[[McpEvent], None] | None = None,
        mcp_headers: Mapping[str, HeadersFunction] | None = None,
        on_elicitation: OnElicitation | None = None,
        **agent_options: Unpack[AgentOptions],
    ) -> None:
        self._default_client: LLMClient | None = None
        if isinstance(client, str | os.PathLike | Mapping) and not str(client).startswith(("http:", "https:")):
            raise wrong_type("client", "an LLMClient or an LLMClientPool", client, _CONFIG_HINT)
        if isinstance(config_path, Mapping):
            raise wrong_type("config_path", "the path of a file", config_path, _CONFIG_HINT)
        if client is None:
            client = self._default_client = LLMClient(limits="auto")
        self._agent = Agent(client, **agent_options)
        self._agent_options = agent_options
        self._make_hub = partial(
            McpHub,
            config_path,
            trust_project=trust_project,
            connect_timeout=connect_timeout,
            on_event=on_mcp_event,
            headers=mcp_headers,
            on_elicitation=on_elicitation,
        )
        self._hub = self._make_hub()
        self._runs: weakref.WeakSet[RunHandle] = weakref.WeakSet()
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._agent!r}>"

    @property
    def model(self) -> str | None:
        """The model for runs that do not name one, or None if the server or the pool chooses it."""
        return self._agent.model

    @explains_missing_await
    async def list_available_mcps(self) -> list[str]:
        """Returns the names of the enabled servers, in the order of the configuration file. It does not start them.

        Raises:
            MCPError: The configuration file cannot be read.
        """
        return await self._hub.names()

    async def switch_model(self, model: str) -> None:
        """Changes the default model of the agent. `Agent.switch_model` describes what happens to runs in flight.

        Raises:
            LLMValidationError: The name is not valid.
            ModelChangedDuringExecutionError: The `switch_policy` is "reject" and runs are in flight, or the call comes
                from a tool of a run that would have to end first.
        """
        await self._agent.switch_model(model)

    @overload
    async def autonomous_with_mcp(
        self,
        mcp_name: str,
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralFalse = ...,
        **options: Unpack[RunOptions],
    ) -> str: ...
    @overload
    async def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: LiteralFalse = ..., full: LiteralTrue, **options: Unpack[RunOptions]
    ) -> RunResult: ...
    @overload
    async def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: LiteralTrue, full: LiteralFalse = ..., **options: Unpack[RunOptions]
    ) -> RunStream: ...
    @overload
    async def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: bool = ..., full: bool = ..., **options: Unpack[RunOptions]
    ) -> str | RunResult | RunStream: ...
    @explains_missing_await
    async def autonomous_with_mcp(
        self,
        mcp_name: str,
        task: Task,
        *,
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        output_type: Any = None,
        journal: AnyJournal | None = None,
        stream: bool = False,
        full: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str | RunResult | RunStream:
        """Runs a task with the tools of one MCP server.

        Args:
            mcp_name: The name of the server in the configuration file.
            task: The task: a text, or a list of content parts (text and images).
            max_rounds: The maximum number of rounds, each of which is one reply of the model. Default: the agent's
                `max_rounds`.
            max_tokens: The maximum number of tokens in each reply. Default: "auto", which means the agent's
                `max_tokens`.
            model: The model of this run. Default: the agent's model.
            output_type: The type of the answer, as for `Agent.run`. With `full` or `stream`, the answer is available as
                `result.output`; without them, its JSON text is returned. Default: the agent's `output_type`.
            journal: A file that records each step of the run, so that `resume` can continue the run after its program
                was interrupted; see `Agent.run`. Default: None, which records nothing.
            stream: Whether to return a stream of the run's events, as soon as the servers have been started. Default:
                False.
            full: Whether to return the whole `RunResult` instead of the text. Default: False.
            **sampling: `temperature`, `top_p`, `seed`, `stop`, `tool_choice`, `parallel_tool_calls` and `extra_body` of
                this run, in place of the agent's.

        Returns:
            The text of the final answer. With `full`, the `RunResult`. With `stream`, a `RunStream` whose last event is
            `RunFinished(result)`.

        Raises:
            MCPConnectionError: The server could not be started; `.server` is its name.
            MCPError: No enabled server has that name, or the configuration file cannot be read. In both cases
                nothing has been started.
            RunIncompleteError: The run ended without a final answer. With `full`, it is raised only if the run has an
                `output_type`, or as its subclass `MaxRoundsExceededError`; in all other cases the result is returned,
                and its `stop_reason` says why there is no answer.
            LLMValidationError: An argument is not valid, or the model did not give a valid output.
            LLMError: The run failed; `.partial` is the run so far.
        """
        check_server_name(mcp_name)
        options = CompleteRunOptions(
            max_rounds=max_rounds,
            max_tokens=max_tokens,
            model=model,
            output_type=output_type,
            journal=journal,
            sampling=sampling,
        )
        return await self._run(ServerSelection((mcp_name,), "single"), task, options, stream=stream, full=full)

    @overload
    async def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralFalse = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> str: ...
    @overload
    async def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralTrue,
        **options: Unpack[MultiServerRunOptions],
    ) -> RunResult: ...
    @overload
    async def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: LiteralTrue,
        full: LiteralFalse = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> RunStream: ...
    @overload
    async def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: bool = ...,
        full: bool = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> str | RunResult | RunStream: ...
    @explains_missing_await
    async def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        on_mcp_error: OnMcpError = "raise",
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        output_type: Any = None,
        journal: AnyJournal | None = None,
        stream: bool = False,
        full: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str | RunResult | RunStream:
        """Runs a task with the tools of the MCP servers in `mcp_names`.

        `on_mcp_error` says what happens if some of the servers cannot be started. "raise", the default, raises
        `MultiMCPError`. "continue" runs the task with the tools of the others; `RunResult.errors` then maps the name of
        each missing server to its error, and the system message names these servers for the model.

        `autonomous_with_mcp` describes the other arguments, the return value and the other errors.

        Raises:
            MultiMCPError: At least one server could not be started, even if it was the only one; `.errors` maps
                the name of each such server to its error. The servers that could be started keep running.
        """
        names, on_error = check_server_names(mcp_names), check_on_mcp_error(on_mcp_error)
        options = CompleteRunOptions(
            max_rounds=max_rounds,
            max_tokens=max_tokens,
            model=model,
            output_type=output_type,
            journal=journal,
            sampling=sampling,
        )
        return await self._run(ServerSelection(names, on_error), task, options, stream=stream, full=full)

    @overload
    async def autonomous_discover_and_execute(
        self,
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralFalse = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> str: ...
    @overload
    async def autonomous_discover_and_execute(
        self, task: Task, *, stream: LiteralFalse = ..., full: LiteralTrue, **options: Unpack[MultiServerRunOptions]
    ) -> RunResult: ...
    @overload
    async def autonomous_discover_and_execute(
        self, task: Task, *, stream: LiteralTrue, full: LiteralFalse = ..., **options: Unpack[MultiServerRunOptions]
    ) -> RunStream: ...
    @overload
    async def autonomous_discover_and_execute(
        self, task: Task, *, stream: bool = ..., full: bool = ..., **options: Unpack[MultiServerRunOptions]
    ) -> str | RunResult | RunStream: ...
    @explains_missing_await
    async def autonomous_discover_and_execute(
        self,
        task: Task,
        *,
        on_mcp_error: OnMcpError = "continue",
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        output_type: Any = None,
        journal: AnyJournal | None = None,
        stream: bool = False,
        full: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str | RunResult | RunStream:
        """Runs a task with the tools of all enabled MCP servers.

        It works like `autonomous_with_multiple_mcps` with the names of all enabled servers, except that the default of
        `on_mcp_error` is "continue". `autonomous_with_mcp` describes the other arguments, the return value and the
        other errors.

        Raises:
            MCPError: No server is enabled, or the configuration file cannot be read.
        """
        on_error = check_on_mcp_error(on_mcp_error)
        options = CompleteRunOptions(
            max_rounds=max_rounds,
            max_tokens=max_tokens,
            model=model,
            output_type=output_type,
            journal=journal,
            sampling=sampling,
        )
        return await self._run(ServerSelection(None, on_error), task, options, stream=stream, full=full)

    @overload
    async def resume(
        self, path: Journal | str | os.PathLike[str], *, run_id: str | None = ..., full: LiteralFalse = ...
    ) -> str: ...
    @overload
    async def resume(
        self, path: Journal | str | os.PathLike[str], *, run_id: str | None = ..., full: LiteralTrue
    ) -> RunResult: ...
    @overload
    async def resume(
        self, path: Journal | str | os.PathLike[str], *, run_id: str | None = ..., full: bool
    ) -> str | RunResult: ...
    @explains_missing_await
    async def resume(
        self, path: Journal | str | os.PathLike[str], *, run_id: str | None = None, full: bool = False
    ) -> str | RunResult:
        """Resumes a run whose program was interrupted, with the MCP servers that the run began with.

        `Agent.resume` describes what is restored, and what happens to calls that had started. The client, the tools,
        `approve`, `gate`, `output_type` and `observers` are those of this agent.

        Args:
            path: The journal of the run, or its path.
            run_id: The id of the run. Default: the only run that has no result yet, or the only run of the journal.
            full: Whether to return the whole `RunResult` instead of the text. Default: False.

        Raises:
            JournalError: The journal cannot be used; it contains no such run, or several that could be meant; the run
                is in progress elsewhere; or the run cannot be resumed in the way in which it began.
            LLMError: As for `autonomous_with_mcp`.
        """
        hub = self._hub
        # Both kinds of agents continue a run in the same way; only the tools are opened differently.
        handle = await self._agent._start_again(path, run_id, partial(self._open_again, hub))  # noqa: SLF001
        if hub is not self._hub:
            await handle.aclose(_CLOSED_MESSAGE)
        self._runs.add(handle)
        result: RunResult = await handle.result()
        return result if full else _answer_text(result)

    async def close(self) -> None:
        """Cancels the runs in flight, stops all MCP servers, and closes the client if the agent created it.

        When `close` returns, the processes of the servers are gone. It is idempotent, and a later run starts the
        servers again. If the caller is cancelled, or is a tool of one of these runs, the work continues in the
        background, and the next `close` waits for it.
        """
        closing = self._close(self._hub, list(self._runs), self._closing)
        self._hub = self._make_hub()
        self._closing = asyncio.create_task(closing, name="lmbridge-agent-close")
        await asyncio.shield(self._closing)

    async def _close(self, hub: McpHub, runs: Sequence[RunHandle], previous_closing: asyncio.Task[None] | None) -> None:
        async with AsyncExitStack() as stack:
            if self._default_client is not None:
                stack.push_async_callback(self._default_client.close)
            stack.push_async_callback(hub.close)
            await asyncio.gather(*(run.aclose(_CLOSED_MESSAGE) for run in runs))
        if previous_closing is not None and not previous_closing.done():
            await asyncio.wait({previous_closing})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(
        self,
        servers: ServerSelection,
        task: Task,
        options: CompleteRunOptions,
        *,
        stream: bool,
        full: bool,
    ) -> str | RunResult | RunStream:
        """Starts a run with the tools of some servers, and returns its outcome."""
        if stream and full:
            raise LLMValidationError(
                "stream and full cannot both be set",
                hint="leave out full: the last event of a stream has the RunResult",
            )
        hub = self._hub
        try:
            await servers.check_exist(hub)
        except MCPError:
            if hub is self._hub:
                raise
        # `close` was called in the meantime. It cancels all runs, and this one had already begun.
        if hub is not self._hub:
            raise TaskCancelledError(_CLOSED_MESSAGE)
        journal = options["journal"]
        if journal is not None:
            journal = servers.journal_entry(journal)
        handle = self._agent.start(
            task,
            journal=journal,
            open_tools=self._open_tools(hub, servers),
            model=options["model"],
            max_rounds=options["max_rounds"],
            max_tokens=None if options["max_tokens"] == "auto" else options["max_tokens"],
            output_type=options["output_type"],
            **options["sampling"],
        )
        self._runs.add(handle)
        if stream:
            return await _wait_for_start(RunStream(handle, owns_run=True))
        result = await handle.result()
        return result if full else _answer_text(result)

    def _open_again(self, hub: McpHub, extra: Mapping[str, Any]) -> OpenTools:
        """Returns a function that opens the tools of a resumed run, given the `extra` that its journal recorded."""
        return self._open_tools(hub, ServerSelection.from_journal(extra))

    def _open_tools(self, hub: McpHub, servers: ServerSelection) -> OpenTools:
        """Returns a function that starts the servers of a run and opens their tools."""
        # Unless `tool_search` is "never", the agent applies the limit itself: it offers as many tools as fit, and lets
        # the model search for the others.
        is_limited = self._agent_options.get("tool_search") == "never"
        limit = self._agent_options.get("max_definition_tokens", "auto") if is_limited else None
        return partial(servers.open, hub, limit)


async def _wait_for_start(stream: RunStream) -> RunStream:
    """Returns the stream once the run has its tools, so that errors of servers are raised before the first event.

    Raises:
        LLMError: The run failed before it had its tools.
    """
    try:
        await stream.handle.wait_begun()
    except asyncio.CancelledError:
        await stream.aclose()
        raise
    if stream.handle.done:
        await stream.handle.result()
    return stream


def _answer_text(result: RunResult) -> str:
    """Returns the final answer of a run.

    Raises:
        RunIncompleteError: The run ended without an answer.
    """
    if result.has_answer:
        return result.text
    meaning, hint = ENDINGS[result.stop_reason]
    raise RunIncompleteError(
        f"the run ended without an answer: {meaning}",
        result=result,
        hint=f"{hint}; the run so far is in .result",
        context={"operation": "agent run", "model": result.model},
    )
