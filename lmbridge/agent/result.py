"""What a run comes to: its result, and the log of its rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

from lmbridge.agent.tools import ToolCall
from lmbridge.types import Usage

StopReason = Literal[
    "stop", "length", "repetition", "budget", "bad_calls", "max_rounds", "cancelled", "error", "running"
]
"""Why a run ended.

A run that ends with one of the first five returns its result. "max_rounds", "cancelled" and "error" are those of the
result that an exception carries; "running" is that of a run that goes on.
"""

ENDINGS: Final[Mapping[str, tuple[str, str]]] = {
    "length": ("its last reply was cut, at max_tokens or the end of the context", "raise max_tokens, or ask for less"),
    "repetition": ("the model made the same call again and again", "say more plainly what is to be done"),
    "bad_calls": ("the model's calls could not be made", "give it fewer tools, or use another model"),
    "budget": ("max_seconds or max_total_tokens were used up", "raise them"),
    "max_rounds": ("it used up its rounds", "raise max_rounds, or ask for less"),
}
"""What a stop reason without an answer means, and what to do."""


@attrs.frozen(kw_only=True)
class ToolRecord:
    """A call that the model asked for, and what came of it."""

    call: ToolCall
    text: str
    """What the model was told."""
    is_error: bool = False
    """Whether the call could not be made, was refused, or failed."""
    raw: Any = attrs.field(default=None, repr=False)
    """What the tool returned, as it returned it."""
    seconds: float = 0.0


@attrs.frozen(kw_only=True)
class Round:
    """One turn of the model, and the calls that it asked for."""

    number: int
    """From 1."""
    model: str | None
    """The name that the server gave; if it gave none, the one asked for."""
    text: str
    reasoning: str
    finish_reason: str | None
    tool_calls: tuple[ToolRecord, ...]
    """In the order in which the model asked for them."""
    usage: Usage | None
    """Tokens, as the server counted them; None if it told none."""
    seconds: float


@attrs.frozen(kw_only=True)
class RunResult:
    """A run that ended, or as far as it came."""

    text: str
    """What the model said last: its answer, if `stop_reason` is "stop"."""
    model: str | None
    """The model of the run; None before it is fixed, and where the choice is the server's and it named none."""
    rounds: int
    """Rounds that began."""
    stop_reason: StopReason
    messages: list[dict[str, Any]] = attrs.field(repr=False)
    """The whole conversation, valid to go on with: `agent.run(task, messages=result.messages)`."""
    tool_calls: tuple[ToolCall, ...]
    """The calls that the model asked for, in order."""
    usage: Usage
    """The sums over all rounds, as far as the server told."""
    reasoning: str
    """What the model thought before `text`."""
    errors: Mapping[str, Exception] = attrs.field(factory=dict)
    """Sources of tools that failed, by name, where the run went on without them."""
    log: tuple[Round, ...] = attrs.field(default=(), repr=False)
    """The rounds that came to their end."""
