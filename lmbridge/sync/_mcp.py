"""Blocking classes, written by scripts/generate_sync.py: change that, or the asynchronous classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import lmbridge.mcp.dynamic as _dynamic
from lmbridge.sync._wrap import Owner, unwrap

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from typing import Unpack

    from lmbridge.agent.chat_client import ChatClient, ChatClientPool
    from lmbridge.agent.result import RunResult
    from lmbridge.agent.settings import MaxTokens, Task
    from lmbridge.mcp.options import (
        AgentOptions,
        LiteralFalse,
        LiteralTrue,
        MultiServerRunOptions,
        OnMcpError,
        RunOptions,
    )
    from lmbridge.mcp.servers.events import McpEvent
    from lmbridge.sync._agent import RunStream
    from lmbridge.sync._client import LLMClient, LLMClientPool


class DynamicAutonomousAgent(Owner):
    """An agent whose runs name the MCP servers that they need.

    A server is started when the first run needs it, and shared by all runs. One agent serves any number of concurrent
    runs in one event loop. Use it with `with`, or call `close` when you no longer need it::

        with DynamicAutonomousAgent() as agent:
            print(agent.list_available_mcps())
            print(agent.autonomous_with_mcp("time", "What time is it in Tokyo?"))

    Args:
        client: An `LLMClient` or an `LLMClientPool`, which the caller closes. Default: a client that is configured from
            the environment, has `limits="auto"`, and is closed with the agent.
        config_path: The file that names the MCP servers. Default: the first that exists of the file in the environment
            variable `MCP_JSON_PATH`, `./.mcp.json` (only if it is trusted), `~/.lmstudio/mcp.json` and `~/.mcp.json`.
        trust_project: Whether `./.mcp.json` may be used. Default: False, because that file starts programs that the
            author of the current directory has chosen.
        connect_timeout: Seconds for connecting to a server and listing its tools. The configuration file can set
            another value for a server. Default: 30.
        on_mcp_event: A function that is called with each event of a server: state changes, log messages, the progress
            of calls. Default: None.
        **agent_options: The options of `Agent`. Its `tools` are available in each run, in addition to those of the
            servers.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    wraps = "lmbridge.mcp.dynamic:DynamicAutonomousAgent"

    def __init__(
        self,
        client: LLMClient | ChatClient | (LLMClientPool | ChatClientPool) | None = None,
        *,
        config_path: str | os.PathLike[str] | None = None,
        trust_project: bool = False,
        connect_timeout: float | None = None,
        on_mcp_event: Callable[[McpEvent], None] | None = None,
        **agent_options: Unpack[AgentOptions],
    ) -> None:
        self._set_wrapped(
            _dynamic.DynamicAutonomousAgent(
                unwrap(client),
                config_path=config_path,
                trust_project=trust_project,
                connect_timeout=connect_timeout,
                on_mcp_event=on_mcp_event,
                **agent_options,
            )
        )

    @property
    def model(self) -> str | None:
        """The model for runs that do not name one, or None if the server or the pool chooses it."""
        result: str | None = self._call(lambda: self.wrapped.model)
        return result

    def list_available_mcps(self) -> list[str]:
        """Returns the names of the enabled servers, in the order of the configuration file. It does not start them.

        Raises:
            MCPError: The configuration file cannot be read.
        """
        result: list[str] = self._await(self.wrapped.list_available_mcps)
        return result

    def switch_model(self, model: str) -> None:
        """Changes the default model of the agent. `Agent.switch_model` describes what happens to runs in flight."""
        self._await(lambda: self.wrapped.switch_model(model))

    @overload
    def autonomous_with_mcp(
        self,
        mcp_name: str,
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralFalse = ...,
        **options: Unpack[RunOptions],
    ) -> str: ...

    @overload
    def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: LiteralFalse = ..., full: LiteralTrue, **options: Unpack[RunOptions]
    ) -> RunResult: ...

    @overload
    def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: LiteralTrue, full: LiteralFalse = ..., **options: Unpack[RunOptions]
    ) -> RunStream: ...

    @overload
    def autonomous_with_mcp(
        self, mcp_name: str, task: Task, *, stream: bool = ..., full: bool = ..., **options: Unpack[RunOptions]
    ) -> str | RunResult | RunStream: ...

    def autonomous_with_mcp(
        self,
        mcp_name: str,
        task: Task,
        *,
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        output_type: Any = None,
        stream: bool = False,
        full: bool = False,
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
            output_type: The type of the answer, as for `Agent.run`. Set `full` or `stream` to get `result.output`; the
                text is JSON. Default: the agent's `output_type`.
            stream: Whether to return a stream of the run's events, as soon as the servers have been started. Default:
                False.
            full: Whether to return the whole `RunResult` instead of the text. Default: False.

        Returns:
            The text of the final answer. With `full`, the `RunResult`. With `stream`, a `RunStream` whose last event is
            `RunFinished(result)`.

        Raises:
            MCPConnectionError: The server could not be started; `.server` is its name.
            MCPError: No enabled server has that name, or the configuration file cannot be read. In both cases
                nothing has been started.
            RunIncompleteError: The run ended without a final answer. With `full`, only its subclass
                `MaxRoundsExceededError` is raised, and the stop reason of the result names all other cases.
            LLMValidationError: An argument is not valid.
            LLMError: The run failed; `.partial` is the run so far.
        """
        result: str | RunResult | RunStream = self._await(
            lambda: self.wrapped.autonomous_with_mcp(
                mcp_name,
                task,
                max_rounds=max_rounds,
                max_tokens=max_tokens,
                model=model,
                output_type=output_type,
                stream=stream,
                full=full,
            )
        )
        return result

    @overload
    def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralFalse = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> str: ...

    @overload
    def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralTrue,
        **options: Unpack[MultiServerRunOptions],
    ) -> RunResult: ...

    @overload
    def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: LiteralTrue,
        full: LiteralFalse = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> RunStream: ...

    @overload
    def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        stream: bool = ...,
        full: bool = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> str | RunResult | RunStream: ...

    def autonomous_with_multiple_mcps(
        self,
        mcp_names: Sequence[str],
        task: Task,
        *,
        on_mcp_error: OnMcpError = "raise",
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        output_type: Any = None,
        stream: bool = False,
        full: bool = False,
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
        result: str | RunResult | RunStream = self._await(
            lambda: self.wrapped.autonomous_with_multiple_mcps(
                mcp_names,
                task,
                on_mcp_error=on_mcp_error,
                max_rounds=max_rounds,
                max_tokens=max_tokens,
                model=model,
                output_type=output_type,
                stream=stream,
                full=full,
            )
        )
        return result

    @overload
    def autonomous_discover_and_execute(
        self,
        task: Task,
        *,
        stream: LiteralFalse = ...,
        full: LiteralFalse = ...,
        **options: Unpack[MultiServerRunOptions],
    ) -> str: ...

    @overload
    def autonomous_discover_and_execute(
        self, task: Task, *, stream: LiteralFalse = ..., full: LiteralTrue, **options: Unpack[MultiServerRunOptions]
    ) -> RunResult: ...

    @overload
    def autonomous_discover_and_execute(
        self, task: Task, *, stream: LiteralTrue, full: LiteralFalse = ..., **options: Unpack[MultiServerRunOptions]
    ) -> RunStream: ...

    @overload
    def autonomous_discover_and_execute(
        self, task: Task, *, stream: bool = ..., full: bool = ..., **options: Unpack[MultiServerRunOptions]
    ) -> str | RunResult | RunStream: ...

    def autonomous_discover_and_execute(
        self,
        task: Task,
        *,
        on_mcp_error: OnMcpError = "continue",
        max_rounds: int | None = None,
        max_tokens: MaxTokens = "auto",
        model: str | None = None,
        output_type: Any = None,
        stream: bool = False,
        full: bool = False,
    ) -> str | RunResult | RunStream:
        """Runs a task with the tools of all enabled MCP servers.

        It works like `autonomous_with_multiple_mcps` with the names of all enabled servers, except that the default of
        `on_mcp_error` is "continue". `autonomous_with_mcp` describes the other arguments, the return value and the
        other errors.

        Raises:
            MCPError: No server is enabled, or the configuration file cannot be read.
        """
        result: str | RunResult | RunStream = self._await(
            lambda: self.wrapped.autonomous_discover_and_execute(
                task,
                on_mcp_error=on_mcp_error,
                max_rounds=max_rounds,
                max_tokens=max_tokens,
                model=model,
                output_type=output_type,
                stream=stream,
                full=full,
            )
        )
        return result
