"""`DynamicAutonomousAgent`: runs that get their tools from MCP servers."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, TypedDict, Unpack, get_args, overload

from lmbridge.agent.agent import Agent, AnyTool
from lmbridge.agent.result import ENDINGS, RunResult
from lmbridge.agent.runs import RunHandle, RunStream
from lmbridge.agent.settings import Approve, MaxTokens, Task
from lmbridge.agent.source import ChatClient, ChatPool
from lmbridge.agent.switching import SwitchPolicy
from lmbridge.agent.toolset import Equipment, Toolset
from lmbridge.client import LLMClient
from lmbridge.errors import (
    LLMValidationError,
    MCPConnectionError,
    MCPError,
    MultiMCPError,
    RunIncompleteError,
    TaskCancelledError,
)
from lmbridge.mcp.servers.events import McpEvent
from lmbridge.mcp.servers.hub import McpHub

OnError: TypeAlias = Literal["raise", "continue"]
_Failure: TypeAlias = Literal["raise", "continue", "single"]
"""What becomes of a run if a server cannot be started; "single" raises the error of the only one."""
Yes: TypeAlias = Literal[True]
No: TypeAlias = Literal[False]

_SHARE: Final = 2
"""Of a context that is known, definitions of tools may take one part in so many."""
_CLOSED: Final = "the run was cancelled: its agent was closed"


class AgentOptions(TypedDict, total=False):
    """The options of an `Agent`."""

    model: str | None
    tools: Sequence[AnyTool]
    system_prompt: str | None
    max_rounds: int
    max_tokens: MaxTokens
    max_seconds: float | None
    max_total_tokens: int | None
    switch_policy: SwitchPolicy
    tool_timeout: float | None
    max_parallel_tools: int
    max_tool_output: int
    max_bad_calls: int
    approve: Approve | None


class RunOptions(TypedDict, total=False):
    """The options of a run."""

    max_rounds: int | None
    max_tokens: MaxTokens
    model: str | None


class ManyOptions(RunOptions, total=False):
    """The options of a run with several servers."""

    on_mcp_error: OnError


class DynamicAutonomousAgent:
    """An agent whose runs name the MCP servers that they need; those are started when they do, and shared by all runs.

    It can be used without `async with`; then `close()` is the caller's. One serves any number of runs at a time, in
    one event loop.

    Args:
        client: An `LLMClient` or an `LLMClientPool`, which stays the caller's to close. Default: a client of its own,
            made of the environment, with `limits="auto"`.
        config_path: The file that names the servers. Default: `MCP_JSON_PATH`, `./.mcp.json` (if it is trusted),
            `~/.lmstudio/mcp.json`, `~/.mcp.json`.
        trust_project: Whether `./.mcp.json` may be used: it starts programs of whoever wrote it.
        connect_timeout: Seconds for connecting to a server and listing its tools, where the file does not say.
            Default: 30.
        on_mcp_event: Gets what servers tell: changes of their state, log messages, progress of calls.
        **agent_options: As for `Agent`. Its `tools` are there in each run, beside those of the servers.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    def __init__(
        self,
        client: ChatClient | ChatPool | None = None,
        *,
        config_path: str | os.PathLike[str] | None = None,
        trust_project: bool = False,
        connect_timeout: float | None = None,
        on_mcp_event: Callable[[McpEvent], None] | None = None,
        **agent_options: Unpack[AgentOptions],
    ) -> None:
        self._own_client: LLMClient | None = None
        if client is None:
            client = self._own_client = LLMClient(limits="auto")
        self._agent = Agent(client, **agent_options)
        self._tools = list(agent_options.get("tools", ()))
        self._make_hub = partial(
            McpHub, config_path, trust_project=trust_project, connect_timeout=connect_timeout, on_event=on_mcp_event
        )
        self._hub = self._make_hub()
        self._runs: weakref.WeakSet[RunHandle] = weakref.WeakSet()
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._agent!r}>"

    @property
    def model(self) -> str | None:
        """The model of runs that name none; None where the server, or the pool, chooses."""
        return self._agent.model

    async def list_available_mcps(self) -> list[str]:
        """The servers that are enabled, in the order of the file; nothing is started.

        Raises:
            MCPError: the file cannot be read.
        """
        return await self._hub.names()

    async def switch_model(self, model: str) -> None:
        """Gives the agent another model; see `Agent.switch_model`."""
        await self._agent.switch_model(model)

    @overload
    async def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: No = ..., full: No = ..., **options: Unpack[RunOptions]
    ) -> str: ...
    @overload
    async def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: No = ..., full: Yes, **options: Unpack[RunOptions]
    ) -> RunResult: ...
    @overload
    async def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: Yes, full: No = ..., **options: Unpack[RunOptions]
    ) -> RunStream: ...
    @overload
    async def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: bool = ..., full: bool = ..., **options: Unpack[RunOptions]
    ) -> str | RunResult | RunStream: ...
    async def autonomous_with_mcp(
        self,
        mcp_name: str,
        task: Task,
        *,
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        stream: bool = False,
        full: bool = False,
    ) -> str | RunResult | RunStream:
        """Works on a task with the tools of one server.

        Args:
            mcp_name: Its name in the configuration.
            task: What to do: a text, or a list of content parts (text and images).
            max_rounds: Times that the model is asked. Default: the agent's.
            max_tokens: Tokens of a reply; "auto" for the agent's.
            model: The model of this run. Default: the agent's.
            stream: Whether to return the events of the run, as soon as the servers are there.
            full: Whether to return all that is known of the run.

        Returns:
            The answer; or the `RunResult`, or a stream of events which ends with `RunFinished(result)`.

        Raises:
            MCPConnectionError: the server cannot be started; `.server` is its name.
            MCPError: there is none of that name, or the file cannot be read; nothing has been started.
            RunIncompleteError: the run ended without an answer; with `full`, only as `MaxRoundsExceededError`.
            LLMError: what else an agent's run raises, which has the run so far in `.partial`.
        """
        if not isinstance(mcp_name, str):
            raise LLMValidationError(f"mcp_name is {mcp_name!r}", hint="give the name of one server")
        options = RunOptions(max_rounds=max_rounds, max_tokens=max_tokens, model=model)
        return await self._run((mcp_name,), "single", task, options, stream=stream, full=full)

    @overload
    async def autonomous_with_multiple_mcps(
        self, mcp_names: Sequence[str], task: Task, *, stream: No = ..., full: No = ..., **options: Unpack[ManyOptions]
    ) -> str: ...
    @overload
    async def autonomous_with_multiple_mcps(
        self, mcp_names: Sequence[str], task: Task, *, stream: No = ..., full: Yes, **options: Unpack[ManyOptions]
    ) -> RunResult: ...
    @overload
    async def autonomous_with_multiple_mcps(
        self, mcp_names: Sequence[str], task: Task, *, stream: Yes, full: No = ..., **options: Unpack[ManyOptions]
    ) -> RunStream: ...
    @overload
    async def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: bool = ...,
        full: bool = ...,
        **options: Unpack[ManyOptions],
    ) -> str | RunResult | RunStream: ...
    async def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        on_mcp_error: OnError = "raise",
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        stream: bool = False,
        full: bool = False,
    ) -> str | RunResult | RunStream:
        """Works on a task with the tools of several servers.

        Args:
            mcp_names: Their names in the configuration.
            task: As for `autonomous_with_mcp`.
            on_mcp_error: What happens if some cannot be started: "raise", or "continue" with the tools of the others;
                `RunResult.errors` then names those that are missing, and the model is told.
            max_rounds: As for `autonomous_with_mcp`.
            max_tokens: As for `autonomous_with_mcp`.
            model: As for `autonomous_with_mcp`.
            stream: As for `autonomous_with_mcp`.
            full: As for `autonomous_with_mcp`.

        Returns:
            As `autonomous_with_mcp`.

        Raises:
            MultiMCPError: some cannot be started; `.errors` says why. Those that could stay.
            MCPError: there is none of a name; nothing has been started.
            LLMError: as from `autonomous_with_mcp`.
        """
        names, on_error = _checked_names(mcp_names), _checked_on_error(on_mcp_error)
        options = RunOptions(max_rounds=max_rounds, max_tokens=max_tokens, model=model)
        return await self._run(names, on_error, task, options, stream=stream, full=full)

    @overload
    async def autonomous_discover_and_execute(
        self, task: Task, *, stream: No = ..., full: No = ..., **options: Unpack[ManyOptions]
    ) -> str: ...
    @overload
    async def autonomous_discover_and_execute(
        self, task: Task, *, stream: No = ..., full: Yes, **options: Unpack[ManyOptions]
    ) -> RunResult: ...
    @overload
    async def autonomous_discover_and_execute(
        self, task: Task, *, stream: Yes, full: No = ..., **options: Unpack[ManyOptions]
    ) -> RunStream: ...
    @overload
    async def autonomous_discover_and_execute(
        self, task: Task, *, stream: bool = ..., full: bool = ..., **options: Unpack[ManyOptions]
    ) -> str | RunResult | RunStream: ...
    async def autonomous_discover_and_execute(
        self,
        task: Task,
        *,
        on_mcp_error: OnError = "continue",
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        stream: bool = False,
        full: bool = False,
    ) -> str | RunResult | RunStream:
        """Works on a task with the tools of all servers that are enabled.

        Args:
            task: As for `autonomous_with_mcp`.
            on_mcp_error: As for `autonomous_with_multiple_mcps`.
            max_rounds: As for `autonomous_with_mcp`.
            max_tokens: As for `autonomous_with_mcp`.
            model: As for `autonomous_with_mcp`.
            stream: As for `autonomous_with_mcp`.
            full: As for `autonomous_with_mcp`.

        Returns:
            As `autonomous_with_mcp`.

        Raises:
            MultiMCPError: some cannot be started (with "raise"); `.errors` says why. Those that could stay.
            MCPError: none is enabled, or the file cannot be read.
            LLMError: as from `autonomous_with_mcp`.
        """
        on_error = _checked_on_error(on_mcp_error)
        options = RunOptions(max_rounds=max_rounds, max_tokens=max_tokens, model=model)
        return await self._run(None, on_error, task, options, stream=stream, full=full)

    async def close(self) -> None:
        """Cancels the runs in flight, and waits until the servers' processes and the client of its own are gone.

        A second time does nothing. A later run opens them again. It is not cut short: if its caller is cancelled, or
        is a tool of a run that it cancels, it goes on behind their back.
        """
        closing = self._close(self._hub, list(self._runs), self._closing)
        self._hub = self._make_hub()
        self._closing = asyncio.create_task(closing, name="lmbridge-agent-close")
        await asyncio.shield(self._closing)

    async def _close(self, hub: McpHub, runs: Sequence[RunHandle], before: asyncio.Task[None] | None) -> None:
        async with AsyncExitStack() as stack:
            if self._own_client is not None:
                stack.push_async_callback(self._own_client.close)
            stack.push_async_callback(hub.close)
            await asyncio.gather(*(run._leave(TaskCancelledError(_CLOSED)) for run in runs))  # noqa: SLF001 - its own
        if before is not None and not before.done():
            await asyncio.wait({before})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(
        self,
        names: Sequence[str] | None,
        on_error: _Failure,
        task: Task,
        options: RunOptions,
        *,
        stream: bool,
        full: bool,
    ) -> str | RunResult | RunStream:
        if stream and full:
            raise LLMValidationError(
                "stream and full are both set", hint="leave full out: the last event of a stream has the whole result"
            )
        hub = self._hub
        try:
            await _check(hub, names)
        except MCPError:
            if hub is self._hub:
                raise
        if hub is not self._hub:
            raise TaskCancelledError(_CLOSED)
        handle = self._agent._start(  # noqa: SLF001 - made for those who find tools in a way of their own
            task,
            partial(self._equip, hub, names, on_error),
            model=options["model"],
            max_rounds=options["max_rounds"],
            max_tokens=None if options["max_tokens"] == "auto" else options["max_tokens"],
            is_muted=not stream,
        )
        self._runs.add(handle)
        if stream:
            return await _begun(RunStream(handle, owns=True))
        result = await handle.result()
        return result if full else _answer(result)

    @asynccontextmanager
    async def _equip(
        self, hub: McpHub, names: Sequence[str] | None, on_error: _Failure, context: int | None
    ) -> AsyncIterator[Equipment]:
        """The tools for a run that begins, until it is over."""
        most = None if context is None else context // _SHARE
        try:
            tools = await hub.tools(
                names, on_error="raise" if on_error == "single" else on_error, max_definition_tokens=most
            )
        except MultiMCPError as failed:
            if on_error != "single":
                raise
            alone = _alone(failed)
            raise alone from alone.__cause__
        try:
            yield Equipment(await Toolset.collect([*self._tools, tools]), _note(tools.errors), tools.errors)
        finally:
            tools.release()


async def _check(hub: McpHub, names: Sequence[str] | None) -> None:
    """Looks for servers that are not there, before a run begins that would disturb others for nothing.

    Raises:
        MCPError: a name is not known, or none is enabled.
    """
    config = await hub.reload()
    if unknown := [name for name in names or () if name not in config.names]:
        raise config.unknown(unknown[0])
    if names is None and not await hub.names():
        raise config.none_enabled()


def _checked_names(names: Any) -> Sequence[str]:
    is_list = isinstance(names, Sequence) and not isinstance(names, str | bytes)
    if not is_list or not names or not all(isinstance(name, str) for name in names):
        raise LLMValidationError(f"mcp_names is {names!r}", hint="give a list of one name or more")
    return tuple(names)


def _checked_on_error(on_error: OnError) -> OnError:
    if on_error not in get_args(OnError):
        raise LLMValidationError(f"on_mcp_error is {on_error!r}", hint='give "raise" or "continue"')
    return on_error


def _alone(failed: MultiMCPError) -> MCPConnectionError:
    """The error of the only server that was asked for."""
    ((name, error),) = failed.errors.items()
    if isinstance(error, MCPConnectionError):
        return error
    hint = error.hint if isinstance(error, MCPError) else None
    return MCPConnectionError(f"MCP server {name!r} cannot be started: {error.args[0]}", error, server=name, hint=hint)


async def _begun(stream: RunStream) -> RunStream:
    """The stream, when the run has its tools.

    Raises:
        LLMError: it could not get them.
    """
    try:
        await stream.handle.begun()
    except asyncio.CancelledError:
        await stream.aclose()
        raise
    if stream.handle.done:
        await stream.handle.result()
    return stream


def _answer(result: RunResult) -> str:
    """The text of a run that came to an answer.

    Raises:
        RunIncompleteError: it did not.
    """
    if result.stop_reason == "stop":
        return result.text
    meaning, hint = ENDINGS[result.stop_reason]
    raise RunIncompleteError(
        f"the run ended without an answer: {meaning}",
        result=result,
        hint=f"{hint}; what it did is in .result",
        context={"operation": "agent run", "model": result.model},
    )


def _note(errors: Mapping[str, MCPError]) -> str:
    """What the model is told of servers that are missing. Not why: that may be the server's own words."""
    if not errors:
        return ""
    return f"The tools of these MCP servers are missing, because the servers could not be started: {', '.join(errors)}."
