"""The options of `DynamicAutonomousAgent` and of its runs, as types and as checks.

How long the start of a server may take is decided in `mcp.config.server_spec` and, for `npx` and similar programs, in
`mcp.servers.package_runners`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypedDict, get_args

from lmbridge._checks import check_choice, invalid_argument
from lmbridge.agent.agent import AnyJournal
from lmbridge.agent.decision_gate import Gate
from lmbridge.agent.definition_budget import MaxDefinitionTokens
from lmbridge.agent.sampling import SamplingOptions
from lmbridge.agent.settings import (
    Approve,
    CompactionMode,
    MaxTokens,
    OnLimit,
    ReadTextCalls,
    SendReasoning,
    ToolSearch,
)
from lmbridge.agent.switching import SwitchPolicy
from lmbridge.agent.tool_sources import AnyTool
from lmbridge.client.context_overflow import ContextOverflow
from lmbridge.client.questions import TrueFalse
from lmbridge.config import Priority
from lmbridge.observe.observer import Observer

OnMcpError: TypeAlias = Literal["raise", "continue"]
"""What happens to a run if some of its MCP servers cannot be started."""

LiteralTrue: TypeAlias = Literal[True]
"""The type of `stream` or `full` in an overload for callers that pass True."""
LiteralFalse: TypeAlias = Literal[False]
"""The type of `stream` or `full` in an overload for callers that pass False or leave it out."""


class AgentOptions(TypedDict, total=False):
    """The keyword arguments of `Agent`, whose docstring describes them."""

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
    compaction: CompactionMode
    context_overflow: ContextOverflow
    max_bad_calls: int
    on_limit: OnLimit
    max_nudges: int
    repetition_limit: int | None
    deduplicate_calls: bool
    read_text_calls: ReadTextCalls
    repair_calls: bool
    constrain_retries: bool
    tool_search: ToolSearch
    max_definition_tokens: MaxDefinitionTokens
    embedding_model: str | None
    send_reasoning: SendReasoning
    approve: Approve | None
    gate: Gate | TrueFalse | str | None
    priority: Priority | None
    observers: Sequence[Observer]
    output_type: Any
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    extra_body: Mapping[str, Any] | None


class RunOptions(SamplingOptions, total=False):
    """The keyword arguments of a run. The docstring of `DynamicAutonomousAgent.autonomous_with_mcp` describes them."""

    max_rounds: int | None
    max_tokens: MaxTokens
    model: str | None
    output_type: Any
    journal: AnyJournal | None


class CompleteRunOptions(TypedDict):
    """The options of a run with their defaults filled in."""

    max_rounds: int | None
    max_tokens: MaxTokens
    model: str | None
    output_type: Any
    journal: AnyJournal | None
    sampling: SamplingOptions


class MultiServerRunOptions(RunOptions, total=False):
    """The options of a run that uses several MCP servers."""

    on_mcp_error: OnMcpError


_SEVERAL_HINT: Final = "call autonomous_with_multiple_mcps() for several servers"
_ONE_HINT: Final = "put the name of a single server into a list, or call autonomous_with_mcp()"


def check_server_name(mcp_name: Any) -> str:
    """Returns the name if it is a string. Whether a server of that name exists is checked when the run starts.

    Raises:
        LLMValidationError: The name is not a string.
    """
    if not isinstance(mcp_name, str):
        raise invalid_argument("mcp_name", "the name of one MCP server", mcp_name, _SEVERAL_HINT)
    return mcp_name


def check_server_names(mcp_names: Any) -> Sequence[str]:
    """Returns the names as a tuple if they are a sequence of at least one string.

    Raises:
        LLMValidationError: The argument is anything else, such as a single string.
    """
    is_list = isinstance(mcp_names, Sequence) and not isinstance(mcp_names, str | bytes)
    if not is_list or not mcp_names or not all(isinstance(name, str) for name in mcp_names):
        raise invalid_argument("mcp_names", "a list of at least one name of an MCP server", mcp_names, _ONE_HINT)
    return tuple(mcp_names)


def check_on_mcp_error(on_mcp_error: OnMcpError) -> OnMcpError:
    """Returns the argument if it is "raise" or "continue".

    Raises:
        LLMValidationError: The argument is anything else.
    """
    checked: OnMcpError = check_choice("on_mcp_error", on_mcp_error, get_args(OnMcpError))
    return checked
