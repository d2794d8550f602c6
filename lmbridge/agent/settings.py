"""The options of an agent, checked when they are made, and the task of a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from lmbridge._checks import (
    as_validator,
    check_callable,
    check_choice,
    check_integer,
    check_model_name,
    check_seconds,
    check_text,
)
from lmbridge.agent.switching import SwitchPolicy
from lmbridge.agent.tools import ToolCall
from lmbridge.errors import LLMValidationError

Approve: TypeAlias = Callable[[ToolCall], bool | Awaitable[bool]]
MaxTokens: TypeAlias = int | Literal["auto"]
Task: TypeAlias = str | Sequence[Mapping[str, Any]]
"""What to do: a text, or the content parts of a message (text and images)."""

_TASK: Final = "say what is to be done, as a string or as a list of content parts"


def _check_model(_instance: Any, _attribute: attrs.Attribute[Any], value: Any) -> None:
    check_model_name(value)


_COUNT: Final = as_validator(check_integer)
_SECONDS: Final = as_validator(check_seconds)
_APPROVE_HINT: Final = "it is called with a ToolCall and returns True or False"


@attrs.frozen(kw_only=True)
class Settings:
    """How an agent's runs go.

    Raises:
        LLMValidationError: one of them cannot be right.
    """

    model: str | None = attrs.field(default=None, validator=_check_model)
    system_prompt: str | None = attrs.field(default=None, validator=as_validator(check_text, optional=True))
    max_rounds: int = attrs.field(default=25, validator=_COUNT)
    max_tokens: MaxTokens = attrs.field(default="auto", validator=as_validator(check_integer, also="auto"))
    max_seconds: float | None = attrs.field(default=None, validator=_SECONDS)
    max_total_tokens: int | None = attrs.field(default=None, validator=as_validator(check_integer, optional=True))
    switch_policy: SwitchPolicy = attrs.field(
        default="isolate", validator=as_validator(check_choice, choices=get_args(SwitchPolicy))
    )
    tool_timeout: float | None = attrs.field(default=60, validator=_SECONDS)
    max_parallel_tools: int = attrs.field(default=4, validator=_COUNT)
    max_tool_output: int = attrs.field(default=20_000, validator=_COUNT)
    max_bad_calls: int = attrs.field(default=5, validator=_COUNT)
    approve: Approve | None = attrs.field(
        default=None, validator=as_validator(check_callable, optional=True, hint=_APPROVE_HINT)
    )

    def for_run(self, *, max_rounds: int | None, max_tokens: MaxTokens | None) -> Settings:
        """Those of one run; None is what the agent has."""
        if max_rounds is None and max_tokens is None:
            return self
        return attrs.evolve(
            self,
            max_rounds=self.max_rounds if max_rounds is None else max_rounds,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
        )


def checked_task(task: Task) -> str | list[Any]:
    """The content of the message that a task becomes.

    Raises:
        LLMValidationError: it says nothing, or is neither a text nor content parts.
    """
    if isinstance(task, str):
        if not task.strip():
            raise LLMValidationError(f"task is {task!r}", hint=_TASK)
        return task
    if not isinstance(task, Sequence) or isinstance(task, bytes | bytearray):
        raise LLMValidationError(f"task is of type {type(task).__name__}", hint=_TASK)
    if not task or not all(isinstance(part, Mapping) and part.get("type") for part in task):
        raise LLMValidationError("task is a list, but not one of content parts", hint=_TASK)
    return list(task)
