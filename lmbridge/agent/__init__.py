"""The agent layer: autonomous loops over a client that it knows by a Protocol."""

from lmbridge.agent.agent import Agent
from lmbridge.agent.events import (
    ReasoningDelta,
    RoundFinished,
    RoundStarted,
    RunEvent,
    RunFinished,
    TextDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from lmbridge.agent.result import Round, RunResult, ToolRecord
from lmbridge.agent.runs import RunHandle, RunStream
from lmbridge.agent.tools import Tool, ToolCall, ToolContext

__all__ = [
    "Agent",
    "ReasoningDelta",
    "Round",
    "RoundFinished",
    "RoundStarted",
    "RunEvent",
    "RunFinished",
    "RunHandle",
    "RunResult",
    "RunStream",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolCallFinished",
    "ToolCallStarted",
    "ToolContext",
    "ToolRecord",
]
