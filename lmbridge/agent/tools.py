"""`Tool`: what a model may call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, Self, runtime_checkable

import attrs
import msgspec

from lmbridge._checks import check_seconds
from lmbridge.agent.schemas import build_validator
from lmbridge.agent.signatures import first_parameter_is, parameters_of_type, read_signature
from lmbridge.client.schemas import digestible_parameters
from lmbridge.errors import LLMValidationError


@attrs.frozen
class ToolContext:
    """What a tool may know about its call. A function gets it for a parameter that is annotated with it."""

    run_id: str
    """The run that the call belongs to."""
    call_id: str
    """The call, as the model or the server numbered it."""
    tool: str
    """What the tool is called in this run."""
    cancelled: Callable[[], bool] = attrs.field(repr=False)
    """Returns whether the result is no longer awaited. A plain function runs in a thread, which nothing can stop: one
    that takes long calls this now and then, and returns early."""
    tool_timeout: float | None = None
    """The agent's `tool_timeout` in seconds, or None if the agent sets no limit. The agent enforces it, unless the tool
    has a `timeout` of its own; a tool with `timeout=None` can keep to it in its own way."""


@attrs.frozen(eq=False)
class Tool:
    """A function that a model may call, and what the model is told about it.

    Args:
        name: What it is called; any text. Servers are sent a name made from it.
        description: What it does, for the model.
        parameters: A JSON schema of an object. What the model sends is validated against it as it stands; servers are
            sent what they can take of it.
        function: Called with the arguments as keywords, as plain JSON values; async or plain. See `from_function` for
            arguments of other types.
        annotations: Whatever else is known of it, like the hints of an MCP server; for `approve`.
        server: The server it comes from, if there may be several with tools of one name.
        timeout: Seconds that a call may take, in place of the agent's `tool_timeout`, which "agent", the default,
            stands for. With None the agent sets no limit: for a function that enforces one itself, because not all that
            it does is to count. It finds the agent's in `ToolContext.tool_timeout`.

    A function whose arguments may have any names can take the `ToolContext` as a positional-only parameter:
    `async def call(context: ToolContext, /, **arguments)`.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = attrs.field(repr=False)
    function: Callable[..., Any] = attrs.field(repr=False)
    annotations: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True, repr=False)
    server: str | None = attrs.field(default=None, kw_only=True)
    _convert: Callable[[Mapping[str, Any]], dict[str, Any]] | None = attrs.field(
        default=None, kw_only=True, repr=False, alias="_convert"
    )
    timeout: float | Literal["agent"] | None = attrs.field(default="agent", kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise LLMValidationError(f"a tool's name is {self.name!r}", hint="give it a name")
        if not isinstance(self.description, str):
            raise self._wrong(f"its description is {self.description!r}", "give a text; it may be empty")
        if not callable(self.function):
            raise self._wrong(f"its function is {self.function!r}", "give a function, async or plain")
        if not isinstance(self.parameters, Mapping):
            raise self._wrong(f"its parameters are {self.parameters!r}", "give the JSON schema of an object")
        if self.timeout != "agent":
            check_seconds(f"timeout of tool {self.name!r}", self.timeout)
        try:
            msgspec.json.encode(self.sent_parameters)
        except (ValueError, TypeError, RecursionError) as exc:
            raise self._wrong(f"its parameters cannot be sent: {exc}", "give the JSON schema of an object") from exc

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float | Literal["agent"] | None = "agent",
    ) -> Self:
        """The tool that calls a function; its arguments are converted to the annotated types.

        Args:
            function: Async or plain. Each parameter has a type hint.
            name: What the tool is called. Default: the function's name.
            description: What it does. Default: the docstring, up to its first section.
            timeout: Seconds that a call may take; see `Tool`.

        Raises:
            LLMValidationError: a parameter has no place in JSON, or no type hint, or the function is none.
        """
        signature = read_signature(function, injected=ToolContext, name=name)
        return cls(
            signature.name,
            signature.description if description is None else description,
            signature.schema,
            function,
            timeout=timeout,
            _convert=signature.convert,
        )

    @cached_property
    def sent_parameters(self) -> Mapping[str, Any]:
        """What servers are sent in place of `parameters`."""
        return digestible_parameters(self.parameters)

    @cached_property
    def context_names(self) -> tuple[str, ...]:
        """The parameters that get a `ToolContext`."""
        return parameters_of_type(self.function, ToolContext)

    @cached_property
    def takes_context_first(self) -> bool:
        """Whether the function's first parameter is positional-only and takes the `ToolContext`."""
        return first_parameter_is(self.function, ToolContext)

    @cached_property
    def is_async(self) -> bool:
        """Whether the function is called in the event loop; any other one is in a thread of its own."""
        return inspect.iscoroutinefunction(self.function)

    @cached_property
    def convert(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Makes keywords for the function of JSON values, or raises a `ValueError` that says what is wrong where."""
        return self._convert or build_validator(self.parameters, self.sent_parameters)

    @property
    def has_converter(self) -> bool:
        """Whether `convert` is there at once. Where it is not, making it imports a library, which reads files."""
        return self._convert is not None

    def _wrong(self, what: str, hint: str) -> LLMValidationError:
        return LLMValidationError(f"tool {self.name!r}: {what}", hint=hint)


@attrs.frozen
class ToolCall:
    """A call that a model asks for."""

    id: str
    name: str
    """What the tool is called in this run; of an unknown tool, what the model called it."""
    arguments: Mapping[str, Any] | None
    """The arguments, as JSON values; None if what the model sent are none."""
    tool: Tool | None = attrs.field(default=None, repr=False)
    """The tool, if there is one of that name."""


@runtime_checkable
class ToolProvider(Protocol):
    """Something that has tools: it is asked for them at the start of each run."""

    async def list_tools(self) -> Sequence[Tool]:
        """The tools that there are now."""
        ...


def as_tool(tool_or_function: Tool | Callable[..., Any]) -> Tool:
    """The tool, or the one that calls the function.

    Raises:
        LLMValidationError: it is neither, or the function cannot be one.
    """
    return tool_or_function if isinstance(tool_or_function, Tool) else Tool.from_function(tool_or_function)
