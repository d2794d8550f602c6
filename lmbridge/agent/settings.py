"""The options of an agent, checked when they are made, and the task of a run."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from lmbridge.agent.switching import SwitchPolicy
from lmbridge.agent.tools import ToolCall
from lmbridge.client.wire import checked_model
from lmbridge.errors import LLMValidationError

Approve: TypeAlias = Callable[[ToolCall], bool | Awaitable[bool]]
MaxTokens: TypeAlias = int | Literal["auto"]
Task: TypeAlias = str | Sequence[Mapping[str, Any]]
"""What to do: a text, or the content parts of a message (text and images)."""

_TASK: Final = "say what is to be done, as a string or as a list of content parts"


def _invalid(name: str, value: object, hint: str) -> LLMValidationError:
    return LLMValidationError(f"{name} is {value!r}", hint=hint)


def _count(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is None and attribute.default is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _invalid(attribute.name, value, "give a whole number of 1 or more")


def _seconds(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _invalid(attribute.name, value, "give a positive number of seconds, or None for no limit")


def _max_tokens(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise _invalid(attribute.name, value, "give a whole number of 1 or more, or 'auto'")


def _policy(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value not in get_args(SwitchPolicy):
        raise _invalid(attribute.name, value, f"give one of {', '.join(map(repr, get_args(SwitchPolicy)))}")


def _text(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise _invalid(attribute.name, value, "give a text, or None for none")


def _function(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not callable(value):
        raise _invalid(attribute.name, value, "give a function of a ToolCall that returns True or False, or None")


def _model(_: Any, __: attrs.Attribute[Any], value: Any) -> None:
    checked_model(value)


@attrs.frozen(kw_only=True)
class Settings:
    """How an agent's runs go.

    Raises:
        LLMValidationError: one of them cannot be right.
    """

    model: str | None = attrs.field(default=None, validator=_model)
    system_prompt: str | None = attrs.field(default=None, validator=_text)
    max_rounds: int = attrs.field(default=25, validator=_count)
    max_tokens: MaxTokens = attrs.field(default="auto", validator=_max_tokens)
    max_seconds: float | None = attrs.field(default=None, validator=_seconds)
    max_total_tokens: int | None = attrs.field(default=None, validator=_count)
    switch_policy: SwitchPolicy = attrs.field(default="isolate", validator=_policy)
    tool_timeout: float | None = attrs.field(default=60, validator=_seconds)
    max_parallel_tools: int = attrs.field(default=4, validator=_count)
    max_tool_output: int = attrs.field(default=20_000, validator=_count)
    max_bad_calls: int = attrs.field(default=5, validator=_count)
    approve: Approve | None = attrs.field(default=None, validator=_function)

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
            raise _invalid("task", task, _TASK)
        return task
    if not isinstance(task, Sequence) or isinstance(task, bytes | bytearray):
        raise LLMValidationError(f"task is of type {type(task).__name__}", hint=_TASK)
    if not task or not all(isinstance(part, Mapping) and part.get("type") for part in task):
        raise LLMValidationError("task is a list, but not one of content parts", hint=_TASK)
    return list(task)
