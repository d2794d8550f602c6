"""The tools of an agent and of its runs: fixed ones, providers, and tools that are opened for each run.

Tools that need a connection or a process must exist for as long as a run, and must be released when it ends, even if
it is cancelled. A callback for the start and another one for the end would have to be paired by hand. An async context
manager pairs them, so `open_tools` is a function that returns one. The MCP layer uses `open_tools` as any other program
would, and nothing here depends on it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import cached_property
from typing import Any, Final, TypeAlias, TypeGuard

import attrs

from lmbridge._checks import check_callable, check_instance
from lmbridge.agent.definition_budget import definition_tokens
from lmbridge.agent.tool_search import ToolSearchOptions
from lmbridge.agent.tools import Tool, ToolProvider, as_tool
from lmbridge.agent.toolset import Toolset, collect_tools
from lmbridge.errors import LLMError, LLMValidationError, ToolError

AnyTool: TypeAlias = Tool | Callable[..., Any] | ToolProvider
"""What `tools=` accepts: a `Tool`, a function, or an object with `async list_tools()`."""


@attrs.frozen(kw_only=True)
class RunInfo:
    """What is known about a run when its tools are opened."""

    run_id: str
    """The id of the run, which is also `RunHandle.id` and `ToolContext.run_id`."""
    model: str | None
    """The model of the run; None if the server chooses it."""
    context_length: int | None
    """The tokens that fit into the model's context, the answer included; None if the server does not say."""


@attrs.frozen(kw_only=True)
class RunTools:
    """The tools that `open_tools` gives to one run."""

    tools: Sequence[AnyTool] = ()
    """The tools, which are offered beside those of `tools=`. They stay the same until the run ends, unless one of them
    is a provider that adds tools; see `ToolProvider`. Default: none."""
    note: str = ""
    """A text that is added to the leading system message, for example about tools that are missing. Default: none."""
    errors: Mapping[str, Exception] = attrs.field(factory=dict)
    """The errors of the tool sources that failed, by their names. The run goes on without these sources, and the errors
    become `RunResult.errors`. Default: none."""


OpenTools: TypeAlias = Callable[[RunInfo], AbstractAsyncContextManager[RunTools]]
"""A function that is called when a run has been admitted. Its context manager is exited when the run ends."""


@attrs.frozen
class OpenedTools:
    """The tools of a run that is in progress, ready to be offered to its model."""

    toolset: Toolset
    """The tools of all sources."""
    note: str = ""
    """The text to add to the system message; see `RunTools.note`."""
    errors: Mapping[str, Exception] = attrs.field(factory=dict)
    """The errors of tool sources; see `RunTools.errors`."""


_NO_SEARCH: Final = ToolSearchOptions()


class ToolSources:
    """The `tools` and `open_tools` of an agent or of a run.

    Args:
        tools: See `Agent`.
        open_tools: See `Agent`.

    Raises:
        LLMValidationError: An entry cannot be a tool, two tools have the same name, or `open_tools` is not a function.
    """

    def __init__(self, tools: Sequence[AnyTool], open_tools: OpenTools | None) -> None:
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            hint = "pass a list of functions, Tools or providers"
            if callable(tools) or isinstance(tools, Tool):
                hint = "put it into a list, even if it is the only one: tools=[...]"
            raise LLMValidationError(f"tools must be a list, not {type(tools).__name__}", hint=hint)
        self.tools: list[Tool | ToolProvider] = []
        for each in tools:
            self.tools.append(each if _is_provider(each) else as_tool(each))  # type: ignore[arg-type]  # not a provider
        self.open_tools: OpenTools | None = check_callable("open_tools", open_tools, optional=True)
        # Built once for all runs. This also checks the tools when the agent is created.
        self._fixed_toolset = Toolset([each for each in self.tools if isinstance(each, Tool)])
        self._is_fixed = open_tools is None and all(isinstance(each, Tool) for each in self.tools)

    @cached_property
    def _fixed_tokens(self) -> int:
        return sum(definition_tokens(each) for each in self.tools if isinstance(each, Tool))

    @asynccontextmanager
    async def open(self, run: RunInfo, search: ToolSearchOptions = _NO_SEARCH) -> AsyncIterator[OpenedTools]:
        """Yields the tools of a run. Tools that were opened for the run are closed when the block is left.

        Args:
            run: The run.
            search: What happens to tools whose definitions do not fit. By default, all tools are offered.

        Raises:
            LLMValidationError: Two tools have the same name, or the context manager yielded something other than
                `RunTools`.
            ToolError: A provider or `open_tools` raised an error that is not an `LLMError`.
        """
        limit = search.limit(run.context_length)
        if self._is_fixed and (limit is None or self._fixed_tokens <= limit):
            await self._fixed_toolset.prepare()
            yield OpenedTools(self._fixed_toolset)
            return
        async with AsyncExitStack() as stack:
            opened = await self._enter(stack, run)
            toolset = search.toolset(*await collect_tools([*self.tools, *opened.tools]), limit=limit)
            await toolset.prepare()
            yield OpenedTools(toolset, opened.note, opened.errors)

    async def _enter(self, stack: AsyncExitStack, run: RunInfo) -> RunTools:
        if self.open_tools is None:
            return RunTools()
        try:
            opened: RunTools = check_instance(
                "the value of open_tools", await stack.enter_async_context(self.open_tools(run)), RunTools
            )
        except LLMError:
            raise
        # `open_tools` is a function of the program, so it may raise anything.
        except Exception as exc:
            raise ToolError(
                f"open_tools raised {type(exc).__name__}: {exc}",
                exc,
                hint="it must return an async context manager that yields RunTools",
                context={"operation": "agent run", "model": run.model},
            ) from exc
        return opened


def _is_provider(tool: AnyTool) -> TypeGuard[ToolProvider]:
    return not isinstance(tool, Tool | type) and isinstance(tool, ToolProvider)
