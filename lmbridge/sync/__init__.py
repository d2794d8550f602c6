"""The same library without `async`: for scripts, notebooks, Django views and threads.

    from lmbridge.sync import LLMClient

    with LLMClient() as client:
        for chunk in client.chat_completion([{"role": "user", "content": "Hello!"}], stream=True):
            ...

The classes have the methods of the asynchronous ones, which they call in one background event loop that the whole
process shares. They may be used from any thread, and from code in a running event loop, which they block.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from lmbridge.sync._client import ChatStream, LLMClient, LLMClientPool, LMStudio, Models, ResponseStream, TextStream

if TYPE_CHECKING:
    from lmbridge.sync._agent import Agent, RunHandle, RunStream
    from lmbridge.sync._discovery import discover
    from lmbridge.sync._journal import Journal
    from lmbridge.sync._mcp import DynamicAutonomousAgent
    from lmbridge.sync._tool_choice import pick_tools

__all__ = [
    "Agent",
    "ChatStream",
    "DynamicAutonomousAgent",
    "Journal",
    "LLMClient",
    "LLMClientPool",
    "LMStudio",
    "Models",
    "ResponseStream",
    "RunHandle",
    "RunStream",
    "TextStream",
    "discover",
    "pick_tools",
]

# What a program may never use is imported on first use. The agents for MCP servers also need an extra.
_LAZY: Final = {
    "Agent": "_agent",
    "Journal": "_journal",
    "RunHandle": "_agent",
    "RunStream": "_agent",
    "DynamicAutonomousAgent": "_mcp",
    "discover": "_discovery",
    "pick_tools": "_tool_choice",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
