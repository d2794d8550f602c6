"""lmbridge: an async SDK for the language models on your own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmbridge._version import __version__
from lmbridge.client import (
    CacheStats,
    ChatStream,
    LLMClient,
    LLMClientPool,
    ModelInfo,
    ModelValidator,
    PoolStats,
    ReasoningSplitter,
    ResponseEvent,
    ResponseStream,
    ServerInfo,
    TextStream,
    collect,
    image_part,
    split_reasoning,
)
from lmbridge.config import Limits, Timeouts
from lmbridge.errors import (
    ContextLengthExceededError,
    LLMAuthenticationError,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    MaxRoundsExceededError,
    MCPConnectionError,
    MCPError,
    ModelChangedDuringExecutionError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
    MultiMCPError,
    RunIncompleteError,
    TaskCancelledError,
    ToolError,
)
from lmbridge.transport import ClientStats, ModelStats, Transport

if TYPE_CHECKING:
    from lmbridge.local import LocalServer

__all__ = [
    "CacheStats",
    "ChatStream",
    "ClientStats",
    "ContextLengthExceededError",
    "LLMAuthenticationError",
    "LLMClient",
    "LLMClientPool",
    "LLMConnectionError",
    "LLMError",
    "LLMRateLimitError",
    "LLMResponseError",
    "LLMStreamError",
    "LLMTimeoutError",
    "LLMValidationError",
    "Limits",
    "LocalServer",
    "MCPConnectionError",
    "MCPError",
    "MaxRoundsExceededError",
    "ModelChangedDuringExecutionError",
    "ModelInfo",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "ModelStats",
    "ModelValidator",
    "MultiMCPError",
    "PoolStats",
    "ReasoningSplitter",
    "ResponseEvent",
    "ResponseStream",
    "RunIncompleteError",
    "ServerInfo",
    "TaskCancelledError",
    "TextStream",
    "Timeouts",
    "ToolError",
    "Transport",
    "__version__",
    "collect",
    "image_part",
    "split_reasoning",
]


def __getattr__(name: str) -> Any:
    # An extra is imported when it is asked for: the root stays light, and works without it.
    if name == "LocalServer":
        from lmbridge.local import LocalServer  # noqa: PLC0415 - lazily, on purpose

        return LocalServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
