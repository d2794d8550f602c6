"""Turns the definitions of tools that servers send into `Tool` objects, one by one.

A definition that cannot be used does not affect the other tools of its server: the tool is left out, and the caller
gets its name and the reason. The model sees a description and a schema without invisible characters; arguments are
validated against the schema as the server sent it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from lmbridge._tasks import ITEMS_PER_STEP, run_in_slices
from lmbridge._text import shorten
from lmbridge.agent.definition_budget import DefinitionBudget, definition_tokens
from lmbridge.agent.tools import Tool, ToolContext
from lmbridge.client.subschemas import map_subschemas
from lmbridge.errors import LLMValidationError
from lmbridge.mcp.sdk import UNUSABLE_REASON
from lmbridge.mcp.servers.managed_server import ManagedServer
from lmbridge.mcp.servers.results import McpText, read_result
from lmbridge.mcp.servers.sanitize import sanitize_text

_LONGEST_DESCRIPTION: Final = 4_000
"""The length to which a tool's description is shortened, in characters."""
_TEXT_KEYS: Final = ("description", "title")
"""The keys of a schema whose values are prose."""


@attrs.frozen
class LeftOutTool:
    """A tool that is not offered to the model."""

    server: str
    """The name of the server."""
    tool: str
    """The name of the tool, or its position in the list if it has no name."""
    reason: str
    """Why it is not offered."""


async def make_tools(
    server: ManagedServer, definitions: Iterable[Any], timeout: float | None, left_out: list[LeftOutTool]
) -> list[Tool]:
    """Returns the tools of a server that its configuration allows, and lets other tasks run after every 100 of them.

    Args:
        server: The server, which the tools call.
        definitions: The definitions as the server sent them.
        timeout: Seconds that a call may take if the configuration does not say; None for the agent's `tool_timeout`.
        left_out: A list to which the tools that cannot be used are added. Tools that the configuration does not allow
            are not added.
    """
    tools: dict[str, Tool] = {}
    for number, definition in enumerate(definitions, 1):
        if number % ITEMS_PER_STEP == 0:
            await asyncio.sleep(0)
        name = definition.get("name") if isinstance(definition, Mapping) else None
        if isinstance(name, str) and name and not server.spec.offers(name):
            continue
        try:
            tool = _tool_from_definition(server, definition, name, timeout)
            if tool.name in tools:
                raise LLMValidationError("the server has two tools of that name")
        except (LLMValidationError, RecursionError) as exc:
            reason = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
            left_out.append(LeftOutTool(server.spec.name, str(name or f"number {number}"), reason))
        else:
            tools[tool.name] = tool
    return list(tools.values())


def _tool_from_definition(server: ManagedServer, definition: Any, name: Any, timeout: float | None) -> Tool:
    if not isinstance(name, str) or not name:
        raise LLMValidationError("it has no name")
    if UNUSABLE_REASON in definition:
        raise LLMValidationError(str(definition[UNUSABLE_REASON]))
    execution = definition.get("execution")
    if isinstance(execution, Mapping) and execution.get("taskSupport") == "required":
        raise LLMValidationError("it can only be called as a task, which is not supported")
    hints = read_hints(definition)
    schema = definition.get("inputSchema")
    if not isinstance(schema, dict):
        raise LLMValidationError("its inputSchema is not an object")
    if schema.get("type", "object") != "object":
        raise LLMValidationError(f"its inputSchema is of type {schema['type']!r}, not an object")

    timeout = server.spec.timeout_of(name) or timeout

    async def call(context: ToolContext | None = None, /, **arguments: Any) -> McpText:
        seconds = timeout or (None if context is None else context.tool_timeout)
        is_idempotent = hints["idempotentHint"] is True
        result = await server.call(name, arguments, is_idempotent=is_idempotent, timeout=seconds)
        return await run_in_slices(read_result(result))

    return Tool(
        name,
        describe_tool(definition),
        sanitize_schema(schema),
        call,
        # `ManagedServer.call` enforces the limit, because a restart before the call does not count, and because
        # reports of progress extend it.
        timeout=None,
        annotations=hints,
        server=server.spec.name,
    )


def describe_tool(definition: Mapping[str, Any]) -> str:
    """Returns the description of a tool, without invisible characters and shortened if it is too long."""
    for text in (definition.get("description"), definition.get("title")):
        if isinstance(text, str) and text.strip():
            return shorten(sanitize_text(text).strip(), _LONGEST_DESCRIPTION)
    return ""


def sanitize_schema(schema: Any) -> Any:
    """Returns a schema whose titles and descriptions have no invisible characters; nothing else is changed."""
    if not isinstance(schema, Mapping):
        return schema
    sanitized = map_subschemas(schema, sanitize_schema)
    for key in _TEXT_KEYS:
        if isinstance(text := sanitized.get(key), str):
            sanitized[key] = sanitize_text(text)
    return sanitized


def read_hints(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hints of a tool. A missing hint gets the most cautious value, as the protocol specifies.

    Hints are claims of the server, and may be wrong.
    """
    given = definition.get("annotations")
    given = given if isinstance(given, Mapping) else {}
    is_read_only = given.get("readOnlyHint") is True
    cautious_values = {
        "readOnlyHint": False,
        "destructiveHint": not is_read_only,
        "idempotentHint": False,
        "openWorldHint": True,
    }
    return {**cautious_values, **{key: value for key, value in given.items() if value is not None}}


def fit_budget(tools: Sequence[Tool], max_tokens: int | None, left_out: list[LeftOutTool]) -> list[Tool]:
    """Returns the tools whose definitions fit into a token budget, in their original order.

    Args:
        tools: The tools.
        max_tokens: The approximate number of tokens that all definitions together may take; None means no limit.
        left_out: A list to which the tools that do not fit are added.
    """
    budget = DefinitionBudget(max_tokens)
    kept: list[Tool] = []
    for tool in tools:
        if budget.take(tool):
            kept.append(tool)
        else:
            reason = (
                f"its definition takes about {definition_tokens(tool)} tokens, but only {budget.left} of the"
                f" {max_tokens} for all definitions are left"
            )
            left_out.append(LeftOutTool(str(tool.server), tool.name, reason))
    return kept
