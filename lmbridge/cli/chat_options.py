"""The arguments of `lmbridge chat`, for a single answer as well as for a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from lmbridge.cli.answer_schema import AnswerSchema
from lmbridge.cli.answer_view import ReasoningMode
from lmbridge.cli.options import ServerOptions
from lmbridge.cli.tool_options import ToolOptions


@attrs.frozen(kw_only=True)
class ChatOptions:
    """The arguments of `lmbridge chat`."""

    server: ServerOptions
    """The server and the model."""
    tools: ToolOptions
    """The MCP servers whose tools the model gets."""
    system: str | None
    """The system message, or None."""
    images: Sequence[Path]
    """The images that are shown with the first prompt."""
    schema: AnswerSchema | None
    """The schema of the answer, or None if the answer is a text."""
    as_json: bool
    """Whether the whole reply is printed as JSON."""
    continues: bool
    """Whether the last conversation is continued."""
    logs: bool
    """Whether the conversation is written to the log."""
    reasoning: ReasoningMode
    """Whether the reasoning of the model is shown."""
    params: Mapping[str, Any]
    """The parameters of the requests."""
