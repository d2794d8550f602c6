"""lmbridge: an async SDK for the language models on your own machine.

Everything public is imported from here. `LLMClient`, the errors and the options are imported at once. Everything else
is imported at its first use, so that `import lmbridge` stays fast and needs no extra.

If an extra is missing, the module that needs it raises an `ImportError` that names the `pip install`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

# The lowest layer, which imports aiohttp, is imported first. If the import of aiohttp were nested in several others,
# Python 3.11 would enlarge and shrink its stack for each of thousands of calls in it, which takes 15 ms.
from lmbridge.transport import Transport

# isort: split

from lmbridge._version import __version__
from lmbridge.client import ChatStream, LLMClient, collect
from lmbridge.config import Limits, Timeouts
from lmbridge.errors import (
    ContextLengthExceededError,
    JournalError,
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

if TYPE_CHECKING:
    from lmbridge.agent import (
        Agent,
        ChatClient,
        ChatClientPool,
        ChunkStream,
        CompactionStep,
        ContextCompacted,
        Gate,
        ModelNudged,
        Nudge,
        PromptCacheLost,
        ReasoningDelta,
        Round,
        RoundFinished,
        RoundStarted,
        RunEvent,
        RunFinished,
        RunHandle,
        RunInfo,
        RunResult,
        RunStream,
        RunTools,
        TextDelta,
        Tool,
        ToolCall,
        ToolCallFinished,
        ToolCallStarted,
        ToolContext,
        ToolRecord,
        ask_user,
        pick_tools,
    )
    from lmbridge.agent.journal import Journal, JournaledRun, JournalEntry
    from lmbridge.client.answer_text import StreamedText, text_of
    from lmbridge.client.decisions import DecisionAnswer, Decisions
    from lmbridge.client.discovery import FoundServer, discover
    from lmbridge.client.images import image_part
    from lmbridge.client.model_backends import DownloadProgress
    from lmbridge.client.model_validator import CacheStats, ModelValidator
    from lmbridge.client.pool import LLMClientPool, PoolStats
    from lmbridge.client.questions import Choice, Score, TrueFalse
    from lmbridge.client.raw_responses import RawResponse
    from lmbridge.client.reasoning import ReasoningMarkers, ReasoningSplitter, split_reasoning
    from lmbridge.client.responses import ResponseEvent, ResponseStream
    from lmbridge.client.server_info import ModelInfo, ServerInfo
    from lmbridge.client.server_progress import ModelLoading, PromptProgress, progress_of
    from lmbridge.client.text_completions import TextStream
    from lmbridge.client.token_count import TokenCount
    from lmbridge.local import LocalServer
    from lmbridge.log import enable_logging
    from lmbridge.mcp.dynamic import DynamicAutonomousAgent
    from lmbridge.transport.node_pool import NodePool
    from lmbridge.transport.stats import ClientStats, ModelStats, ServerStats

__all__ = [
    "Agent",
    "CacheStats",
    "ChatClient",
    "ChatClientPool",
    "ChatStream",
    "Choice",
    "ChunkStream",
    "ClientStats",
    "CompactionStep",
    "ContextCompacted",
    "ContextLengthExceededError",
    "DecisionAnswer",
    "Decisions",
    "DownloadProgress",
    "DynamicAutonomousAgent",
    "FoundServer",
    "Gate",
    "Journal",
    "JournalEntry",
    "JournalError",
    "JournaledRun",
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
    "ModelLoading",
    "ModelMismatchError",
    "ModelNotFoundError",
    "ModelNudged",
    "ModelStats",
    "ModelValidator",
    "MultiMCPError",
    "NodePool",
    "Nudge",
    "PoolStats",
    "PromptCacheLost",
    "PromptProgress",
    "RawResponse",
    "ReasoningDelta",
    "ReasoningMarkers",
    "ReasoningSplitter",
    "ResponseEvent",
    "ResponseStream",
    "Round",
    "RoundFinished",
    "RoundStarted",
    "RunEvent",
    "RunFinished",
    "RunHandle",
    "RunIncompleteError",
    "RunInfo",
    "RunResult",
    "RunStream",
    "RunTools",
    "Score",
    "ServerInfo",
    "ServerStats",
    "StreamedText",
    "TaskCancelledError",
    "TextDelta",
    "TextStream",
    "Timeouts",
    "TokenCount",
    "Tool",
    "ToolCall",
    "ToolCallFinished",
    "ToolCallStarted",
    "ToolContext",
    "ToolError",
    "ToolRecord",
    "Transport",
    "TrueFalse",
    "__version__",
    "ask_user",
    "collect",
    "discover",
    "enable_logging",
    "image_part",
    "pick_tools",
    "progress_of",
    "split_reasoning",
    "text_of",
]

# The modules of the names that are imported at their first use.
_LAZY: Final = {
    "Gate": "lmbridge.agent",
    "pick_tools": "lmbridge.agent",
    "PromptCacheLost": "lmbridge.agent",
    "ModelLoading": "lmbridge.client.server_progress",
    "PromptProgress": "lmbridge.client.server_progress",
    "progress_of": "lmbridge.client.server_progress",
    "DownloadProgress": "lmbridge.client.model_backends",
    "TrueFalse": "lmbridge.client.questions",
    "Score": "lmbridge.client.questions",
    "Decisions": "lmbridge.client.decisions",
    "DecisionAnswer": "lmbridge.client.decisions",
    "Choice": "lmbridge.client.questions",
    "Agent": "lmbridge.agent",
    "CacheStats": "lmbridge.client.model_validator",
    "ChatClient": "lmbridge.agent",
    "ChatClientPool": "lmbridge.agent",
    "ChunkStream": "lmbridge.agent",
    "ClientStats": "lmbridge.transport.stats",
    "CompactionStep": "lmbridge.agent",
    "ContextCompacted": "lmbridge.agent",
    "DynamicAutonomousAgent": "lmbridge.mcp.dynamic",
    "FoundServer": "lmbridge.client.discovery",
    "Journal": "lmbridge.agent.journal",
    "JournalEntry": "lmbridge.agent.journal",
    "JournaledRun": "lmbridge.agent.journal",
    "LLMClientPool": "lmbridge.client.pool",
    "LocalServer": "lmbridge.local",
    "ModelInfo": "lmbridge.client.server_info",
    "ModelNudged": "lmbridge.agent",
    "ModelStats": "lmbridge.transport.stats",
    "ModelValidator": "lmbridge.client.model_validator",
    "Nudge": "lmbridge.agent",
    "PoolStats": "lmbridge.client.pool",
    "RawResponse": "lmbridge.client.raw_responses",
    "ReasoningDelta": "lmbridge.agent",
    "ReasoningMarkers": "lmbridge.client.reasoning",
    "ReasoningSplitter": "lmbridge.client.reasoning",
    "ResponseEvent": "lmbridge.client.responses",
    "ResponseStream": "lmbridge.client.responses",
    "Round": "lmbridge.agent",
    "RoundFinished": "lmbridge.agent",
    "RoundStarted": "lmbridge.agent",
    "RunEvent": "lmbridge.agent",
    "RunFinished": "lmbridge.agent",
    "RunHandle": "lmbridge.agent",
    "RunInfo": "lmbridge.agent",
    "RunResult": "lmbridge.agent",
    "RunStream": "lmbridge.agent",
    "RunTools": "lmbridge.agent",
    "NodePool": "lmbridge.transport.node_pool",
    "ServerInfo": "lmbridge.client.server_info",
    "ServerStats": "lmbridge.transport.stats",
    "StreamedText": "lmbridge.client.answer_text",
    "TextDelta": "lmbridge.agent",
    "TextStream": "lmbridge.client.text_completions",
    "TokenCount": "lmbridge.client.token_count",
    "Tool": "lmbridge.agent",
    "ToolCall": "lmbridge.agent",
    "ToolCallFinished": "lmbridge.agent",
    "ToolCallStarted": "lmbridge.agent",
    "ToolContext": "lmbridge.agent",
    "ToolRecord": "lmbridge.agent",
    "ask_user": "lmbridge.agent",
    "discover": "lmbridge.client.discovery",
    "enable_logging": "lmbridge.log",
    "image_part": "lmbridge.client.images",
    "split_reasoning": "lmbridge.client.reasoning",
    "text_of": "lmbridge.client.answer_text",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
