"""`pick_tools` for programs without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmbridge.agent import decision_gate
from lmbridge.agent.tools import Tool
from lmbridge.sync._portal import portal
from lmbridge.sync._wrap import unwrap


def pick_tools(
    client: Any,
    task: str,
    tools: Sequence[Tool | Callable[..., Any]],
    *,
    limit: int = 10,
    model: str | None = None,
    fallback: bool = True,
) -> list[Tool]:
    """Returns the tools that a task most likely needs, as `lmbridge.pick_tools` does, and blocks until it has them.

    Args:
        client: An `lmbridge.sync.LLMClient`, or a pool of them.
        task: What is to be done.
        tools: All tools, or functions from which tools can be made.
        limit: How many tools to return at most. Default: 10.
        model: The model that decides. Default: that of the client.
        fallback: Whether a model that is not a decision model may decide. Default: True.

    Returns:
        The tools in the order in which they were given, so that the same tools make the same prompt.

    Raises:
        LLMValidationError: An argument is not valid; nothing was sent.
        LLMError: The same errors as `LLMClient.decide`.
    """
    inner = unwrap(client)
    return portal.run(lambda: decision_gate.pick_tools(inner, task, tools, limit=limit, model=model, fallback=fallback))
