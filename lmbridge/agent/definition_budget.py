"""`DefinitionBudget`: how much of the model's context the definitions of tools may take.

Every definition is a part of every prompt. Even a few MCP servers may have more definitions than fit into the context
of a small model. And long before the context is full, the model gets slow and chooses badly.

Which tools of MCP servers are left out, and how that is reported, is decided in `mcp.servers.definitions`.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

from lmbridge.agent.tools import Tool
from lmbridge.client.token_count import BYTES_PER_TOKEN

MaxDefinitionTokens: TypeAlias = int | Literal["auto"] | None
"""About how many tokens the definitions of tools may take; "auto" is half of the context, and None means no limit."""

_SHARE: Final = 0.5
"""The part of the model's context that definitions may take with "auto", if the length of the context is known."""


class DefinitionBudget:
    """Counts the tokens that the definitions of a run take.

    Args:
        max_tokens: The approximate number of tokens that all of them together may take; None means no limit.

    Attributes:
        max_tokens: The approximate number of tokens that all definitions together may take; None means no limit.
        spent: How many tokens the definitions take so far.
    """

    def __init__(self, max_tokens: int | None) -> None:
        self.max_tokens = max_tokens
        self.spent: int = 0

    @property
    def left(self) -> int | None:
        """The number of tokens that are left; None means no limit."""
        return None if self.max_tokens is None else self.max_tokens - self.spent

    def take(self, tool: Tool, *, reserve: int = 0) -> bool:
        """Counts the definition of a tool if there is room for it, and returns whether there is.

        Args:
            tool: The tool.
            reserve: The number of tokens that have to remain. Default: 0.
        """
        tokens = definition_tokens(tool)
        if self.max_tokens is not None and self.spent + tokens + reserve > self.max_tokens:
            return False
        self.spent += tokens
        return True


def definition_limit(max_tokens: MaxDefinitionTokens, context_length: int | None) -> int | None:
    """Returns the number of tokens that the definitions of a run may take; None means no limit.

    Args:
        max_tokens: The option `max_definition_tokens` of the run.
        context_length: The number of tokens in the model's context; None if it is unknown.
    """
    if max_tokens == "auto":
        return None if context_length is None else int(context_length * _SHARE)
    return max_tokens


def definition_tokens(tool: Tool) -> int:
    """Returns about how many tokens the definition of a tool takes in a request."""
    size = len(msgspec.json.encode([tool.name, tool.description, tool.sent_parameters]))
    # Negating twice rounds up.
    return -(-size // BYTES_PER_TOKEN)
