"""Definitions of tools, as servers send them, made `Tool`s: one by one, so that a bad one costs only itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs
import msgspec

from lmbridge.agent.tools import Tool, ToolContext
from lmbridge.errors import LLMValidationError
from lmbridge.mcp.config.files import is_offered
from lmbridge.mcp.sdk import REFUSED
from lmbridge.mcp.servers.managed import McpServer
from lmbridge.mcp.servers.results import McpText, clean_schema, description_of, hints_of, text_of

_BYTES_PER_TOKEN: Final = 3
"""As an agent estimates prompts."""


@attrs.frozen
class LeftOut:
    """A tool that is not offered."""

    server: str
    tool: str
    reason: str


def tools_of(
    server: McpServer, definitions: Iterable[Any], timeout: float | None, left_out: list[LeftOut]
) -> list[Tool]:
    """The tools that a server offers and its configuration lets through.

    Args:
        server: The server.
        definitions: As it sent them.
        timeout: Seconds that a call may take.
        left_out: Gets those that cannot be used.
    """
    tools: dict[str, Tool] = {}
    for number, definition in enumerate(definitions):
        name = definition.get("name") if isinstance(definition, Mapping) else None
        if isinstance(name, str) and name and not is_offered(name, server.spec):
            continue
        try:
            tool = _tool(server, definition, name, timeout)
            if tool.name in tools:
                raise LLMValidationError("the server has two of that name")
        except (LLMValidationError, RecursionError) as exc:
            reason = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
            left_out.append(LeftOut(server.spec.name, str(name or f"number {number + 1}"), reason))
        else:
            tools[tool.name] = tool
    return list(tools.values())


def _tool(server: McpServer, definition: Any, name: Any, timeout: float | None) -> Tool:
    if not isinstance(name, str) or not name:
        raise LLMValidationError("it has no name")
    if REFUSED in definition:
        raise LLMValidationError(str(definition[REFUSED]))
    execution = definition.get("execution")
    if isinstance(execution, Mapping) and execution.get("taskSupport") == "required":
        raise LLMValidationError("it can only be called as a task, which is not supported")
    hints = hints_of(definition)
    schema = definition.get("inputSchema")
    if not isinstance(schema, dict):
        raise LLMValidationError("its inputSchema is no object")
    if schema.get("type", "object") != "object":
        raise LLMValidationError(f"its inputSchema is of type {schema['type']!r}, not an object")

    async def call(context: ToolContext | None = None, /, **arguments: Any) -> McpText:
        seconds = timeout or (None if context is None else context.tool_timeout)
        is_idempotent = hints["idempotentHint"] is True
        result = await server.call(name, arguments, is_idempotent=is_idempotent, timeout=seconds)
        return McpText(text_of(result), result)

    return Tool(
        name,
        description_of(definition),
        clean_schema(schema),
        call,
        # The server enforces the limit, because a restart before the call does not count.
        timeout=None,
        annotations=hints,
        server=server.spec.name,
    )


def within_budget(tools: Sequence[Tool], most: int | None, left_out: list[LeftOut]) -> list[Tool]:
    """The tools, in their order, whose definitions fit.

    Args:
        tools: The tools.
        most: About how many tokens their definitions may take; None for any number.
        left_out: Gets those that do not fit.
    """
    if most is None:
        return list(tools)
    kept: list[Tool] = []
    spent = 0
    for tool in tools:
        tokens = _tokens(tool)
        if spent + tokens <= most:
            spent += tokens
            kept.append(tool)
        else:
            reason = f"its definition takes about {tokens} tokens, and of {most} for all {most - spent} were left"
            left_out.append(LeftOut(str(tool.server), tool.name, reason))
    return kept


def _tokens(tool: Tool) -> int:
    size = len(msgspec.json.encode([tool.name, tool.description, tool.sent_parameters]))
    return -(-size // _BYTES_PER_TOKEN)
