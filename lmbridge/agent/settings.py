"""The options of an agent, checked when it is created, and the task of a run.

The options that are sent to the server, such as `tool_choice`, are in `sampling`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from lmbridge._checks import (
    as_validator,
    check_bool,
    check_callable,
    check_choice,
    check_integer,
    check_model_name,
    check_seconds,
    check_text,
    invalid_argument,
)
from lmbridge.agent.definition_budget import MaxDefinitionTokens
from lmbridge.agent.sampling import check_sampling
from lmbridge.agent.switching import SwitchPolicy
from lmbridge.agent.tools import ToolCall
from lmbridge.client.context_overflow import ContextOverflow
from lmbridge.client.structured import answer_format_of
from lmbridge.config import check_priority
from lmbridge.errors import LLMValidationError
from lmbridge.observe.observer import Observer, Observers, as_observers

Approve: TypeAlias = Callable[[ToolCall], bool | str | ToolCall | Awaitable[bool | str | ToolCall]]
"""A function that decides about a call: it returns True, False, the reason for a refusal, or a call to make instead."""
CompactionMode: TypeAlias = Literal["summarize", "shorten", "drop"]
"""How room is made in a full context; see the option `compaction` of `Agent`."""
MaxTokens: TypeAlias = int | Literal["auto"]
"""A limit on the tokens of a reply; "auto" derives it from the model's context."""
OnLimit: TypeAlias = Literal["raise", "answer"]
"""What happens when a run has used up its rounds, its tokens or its repetitions."""
SendReasoning: TypeAlias = bool | Literal["auto"]
"""Whether the model's reasoning is sent back to it; "auto" sends it to a server that has demanded it."""
ToolSearch: TypeAlias = Literal["auto", "never"]
"""Whether the model can search for tools whose definitions do not fit; with "auto", it can if there are such tools."""
ReadTextCalls: TypeAlias = Literal["always", "whole", "never"]
"""Which of the calls that a model wrote as text are read: all, only those that are the whole reply, or none."""
Task: TypeAlias = str | Sequence[Mapping[str, Any]]
"""What to do, as a string or as the content parts of a message (text and images)."""

_TASK_HINT: Final = "pass a string that is not blank, or a list of content parts"


def _check_output_type(_instance: Any, _attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None:
        answer_format_of(value)


def _check_send_reasoning(_instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value != "auto" and not isinstance(value, bool):
        raise invalid_argument(attribute.name, "True, False or 'auto'", value)


def _check_model(_instance: Any, _attribute: attrs.Attribute[Any], value: Any) -> None:
    check_model_name(value)


def _check_embedding_model(_instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_model_name(value, name=attribute.name)


def _to_observers(value: Sequence[Observer] | Observers | None) -> Observers | None:
    return value if value is None or isinstance(value, Observers) else as_observers(value)


_POSITIVE_INTEGER: Final = as_validator(check_integer)
_OPTIONAL_SECONDS: Final = as_validator(check_seconds)
_APPROVE_HINT: Final = "it is called with a ToolCall, and returns True, False, a reason why not, or another ToolCall"


@attrs.frozen(kw_only=True)
class Settings:
    """The options of an agent's runs, which are documented at `Agent`.

    Raises:
        LLMValidationError: An option is invalid.
    """

    model: str | None = attrs.field(default=None, validator=_check_model)
    system_prompt: str | None = attrs.field(default=None, validator=as_validator(check_text, optional=True))
    max_rounds: int = attrs.field(default=25, validator=_POSITIVE_INTEGER)
    # For this field and the following ones with a Literal type, pyright infers the type `str` from the default.
    max_tokens: MaxTokens = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="auto", validator=as_validator(check_integer, keyword="auto")
    )
    max_seconds: float | None = attrs.field(default=None, validator=_OPTIONAL_SECONDS)
    max_total_tokens: int | None = attrs.field(default=None, validator=as_validator(check_integer, optional=True))
    switch_policy: SwitchPolicy = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="isolate", validator=as_validator(check_choice, choices=get_args(SwitchPolicy))
    )
    tool_timeout: float | None = attrs.field(default=60, validator=_OPTIONAL_SECONDS)
    max_parallel_tools: int = attrs.field(default=4, validator=_POSITIVE_INTEGER)
    max_tool_output: int = attrs.field(default=20_000, validator=_POSITIVE_INTEGER)
    compaction: CompactionMode = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="summarize", validator=as_validator(check_choice, choices=get_args(CompactionMode))
    )
    context_overflow: ContextOverflow = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="warn", validator=as_validator(check_choice, choices=get_args(ContextOverflow))
    )
    max_bad_calls: int = attrs.field(default=5, validator=_POSITIVE_INTEGER)
    on_limit: OnLimit = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="raise", validator=as_validator(check_choice, choices=get_args(OnLimit))
    )
    max_nudges: int = attrs.field(default=2, validator=as_validator(check_integer, minimum=0))
    repetition_limit: int | None = attrs.field(
        default=5, validator=as_validator(check_integer, minimum=2, optional=True)
    )
    deduplicate_calls: bool = attrs.field(default=True, validator=as_validator(check_bool))
    read_text_calls: ReadTextCalls = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="always", validator=as_validator(check_choice, choices=get_args(ReadTextCalls))
    )
    repair_calls: bool = attrs.field(default=True, validator=as_validator(check_bool))
    constrain_retries: bool = attrs.field(default=True, validator=as_validator(check_bool))
    tool_search: ToolSearch = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="auto", validator=as_validator(check_choice, choices=get_args(ToolSearch))
    )
    max_definition_tokens: MaxDefinitionTokens = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="auto", validator=as_validator(check_integer, keyword="auto", optional=True)
    )
    embedding_model: str | None = attrs.field(default=None, validator=_check_embedding_model)
    send_reasoning: SendReasoning = attrs.field(default="auto", validator=_check_send_reasoning)
    approve: Approve | None = attrs.field(
        default=None, validator=as_validator(check_callable, optional=True, hint=_APPROVE_HINT)
    )
    output_type: Any = attrs.field(default=None, validator=_check_output_type)
    priority: int | None = attrs.field(default=None, converter=attrs.converters.optional(check_priority))
    observers: Observers | None = attrs.field(default=None, converter=_to_observers)
    sampling: Mapping[str, Any] = attrs.field(factory=dict, converter=check_sampling)

    def for_run(
        self,
        *,
        max_rounds: int | None,
        max_tokens: MaxTokens | None,
        output_type: Any,
        sampling: Mapping[str, Any],
    ) -> Settings:
        """Returns the settings of one run; None stands for the agent's own value."""
        if max_rounds is None and max_tokens is None and output_type is None and not sampling:
            return self
        return attrs.evolve(
            self,
            max_rounds=self.max_rounds if max_rounds is None else max_rounds,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            output_type=self.output_type if output_type is None else output_type,
            sampling={**self.sampling, **check_sampling(sampling)},
        )


def check_task(task: Task) -> str | list[Any]:
    """Returns the content of the user message that a task becomes.

    Raises:
        LLMValidationError: The task is blank, or neither a string nor content parts.
    """
    if isinstance(task, str):
        if not task.strip():
            raise LLMValidationError("task must be a string that is not blank", hint=_TASK_HINT)
        return task
    if not isinstance(task, Sequence) or isinstance(task, bytes | bytearray):
        raise LLMValidationError(f"task must be a string or a list, not {type(task).__name__}", hint=_TASK_HINT)
    if not task or not all(isinstance(part, Mapping) and part.get("type") for part in task):
        raise LLMValidationError("task is a list, but not of content parts with a 'type'", hint=_TASK_HINT)
    return list(task)
