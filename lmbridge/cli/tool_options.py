"""The options about MCP servers and their tools, which several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import attrs
import typer

ApprovalMode = Literal["ask", "all", "none"]
"""Which of the calls that may change or delete something are made: those that a person approves, all, or none."""

McpNames: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--mcp", metavar="NAME", help="An MCP server whose tools the model gets; may be repeated."),
]
McpConfigFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--mcp-config",
        metavar="FILE",
        help="The configuration file. Default: MCP_JSON_PATH, ./.mcp.json if it is trusted, ~/.lmstudio/mcp.json,"
        " ~/.mcp.json.",
    ),
]
TrustProject: TypeAlias = Annotated[
    bool, typer.Option("--trust-project", help="Use ./.mcp.json, which starts programs that its author has chosen.")
]
Approval: TypeAlias = Annotated[
    ApprovalMode,
    typer.Option("--approve", help="Calls that may change or delete something: ask you, make all, or make none."),
]


@attrs.frozen(kw_only=True)
class ToolOptions:
    """The MCP servers of a command, and what their tools may do."""

    names: Sequence[str] = ()
    """The servers of the configuration whose tools the model gets."""
    config: Path | None = None
    """The configuration file; None stands for the first of the default files that exists."""
    trust_project: bool = False
    """True if `./.mcp.json` may be used."""
    approval: ApprovalMode = "ask"
    """Which of the calls that may change or delete something are made."""
