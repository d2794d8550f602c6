"""The agent layer: runs a model with tools in a loop, over any client that satisfies a Protocol."""

from lmbridge.agent.agent import Agent
from lmbridge.agent.ask_user import ask_user
from lmbridge.agent.chat_client import ChatClient, ChatClientPool, ChunkStream
from lmbridge.agent.decision_gate import Gate, pick_tools
from lmbridge.agent.events import (
    ContextCompacted,
    ModelNudged,
    PromptCacheLost,
    ReasoningDelta,
    RoundFinished,
    RoundStarted,
    RunEvent,
    RunFinished,
    TextDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from lmbridge.agent.result import CompactionStep, Nudge, Round, RunResult, ToolRecord
from lmbridge.agent.runs import RunHandle, RunStream
from lmbridge.agent.tool_sources import RunInfo, RunTools
from lmbridge.agent.tools import Tool, ToolCall, ToolContext

__all__ = [
    "Agent",
    "ChatClient",
    "ChatClientPool",
    "ChunkStream",
    "CompactionStep",
    "ContextCompacted",
    "Gate",
    "ModelNudged",
    "Nudge",
    "PromptCacheLost",
    "ReasoningDelta",
    "Round",
    "RoundFinished",
    "RoundStarted",
    "RunEvent",
    "RunFinished",
    "RunHandle",
    "RunInfo",
    "RunResult",
    "RunStream",
    "RunTools",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolCallFinished",
    "ToolCallStarted",
    "ToolContext",
    "ToolRecord",
    "ask_user",
    "pick_tools",
]
