"""`Tool`: what a model may call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, Self, runtime_checkable

import attrs
import msgspec

from lmbridge.agent.schemas import build_validator
from lmbridge.agent.signatures import parameters_of_type, read_signature
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
    """Whether nobody waits for the result any more. A plain function runs in a thread, which nothing can stop: one
    that takes long asks now and then."""


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
    _timed: Callable[[float | None], Callable[..., Any]] | None = attrs.field(
        default=None, kw_only=True, repr=False, alias="_timed"
    )
    """Makes the function for a call that may take so many seconds. It keeps to them itself: not all that it does is the
    call, such as the restart of a server before it."""

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise LLMValidationError(f"a tool's name is {self.name!r}", hint="give it a name")
        if not isinstance(self.description, str):
            raise self._wrong(f"its description is {self.description!r}", "give a text; it may be empty")
        if not callable(self.function):
            raise self._wrong(f"its function is {self.function!r}", "give a function, async or plain")
        if not isinstance(self.parameters, Mapping):
            raise self._wrong(f"its parameters are {self.parameters!r}", "give the JSON schema of an object")
        try:
            msgspec.json.encode(self.sent_parameters)
        except (ValueError, TypeError, RecursionError) as exc:
            raise self._wrong(f"its parameters cannot be sent: {exc}", "give the JSON schema of an object") from exc

    @classmethod
    def from_function(
        cls, function: Callable[..., Any], *, name: str | None = None, description: str | None = None
    ) -> Self:
        """The tool that calls a function; its arguments are converted to the annotated types.

        Args:
            function: Async or plain. Each parameter has a type hint.
            name: What the tool is called. Default: the function's name.
            description: What it does. Default: the docstring, up to its first section.

        Raises:
            LLMValidationError: a parameter has no place in JSON, or no type hint, or the function is none.
        """
        signature = read_signature(function, injected=ToolContext, name=name)
        return cls(
            signature.name,
            signature.description if description is None else description,
            signature.schema,
            function,
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

    def within(self, seconds: float | None) -> tuple[Callable[..., Any], float | None]:
        """The function for a call that may take so many seconds, and the seconds after which it is to be cut."""
        return (self.function, seconds) if self._timed is None else (self._timed(seconds), None)

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
