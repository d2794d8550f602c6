"""`Tool`, a function that a model may call, and the classes that describe a call.

A tool is a name, a description, a JSON schema and a function. Everything else, such as the version of the schema that
servers receive, is derived from these when it is first needed, because an agent may be given hundreds of tools of MCP
servers and use three of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, Self, runtime_checkable

import attrs
import msgspec

from lmbridge._checks import check_bool, check_seconds
from lmbridge.agent.argument_checks import build_validator
from lmbridge.agent.coercion import Coercer
from lmbridge.agent.signatures import first_parameter_is, parameters_of_type, read_signature
from lmbridge.client.json_codec import encode_body
from lmbridge.client.sendable_schemas import simplify_definition, simplify_parameters
from lmbridge.errors import LLMValidationError


@attrs.frozen
class ToolContext:
    r"""Information about a call, which a function receives for a parameter that is annotated with this class.

    ```python
    def count_lines(folder: str, context: ToolContext) -> int:
        lines = 0
        for path in Path(folder).rglob("*.txt"):
            if context.cancelled():
                break
            lines += path.read_text().count("\n")
        return lines
    ```
    """

    run_id: str
    """The id of the run that the call belongs to."""
    call_id: str
    """The id of the call, which is unique within its reply: the one that the server gave it, or a new one if that was
    missing or taken."""
    tool: str
    """The name of the tool in this run."""
    cancelled: Callable[[], bool] = attrs.field(repr=False)
    """Returns whether the result is no longer needed. A plain function runs in a thread, which cannot be stopped, so a
    function that may take long should call this regularly, and return early if the result is True."""
    tool_timeout: float | None = None
    """The agent's `tool_timeout` in seconds, or None if the agent has no limit. The agent enforces this limit unless
    the tool has its own `timeout`. A tool with `timeout=None` can enforce it in another way."""


@attrs.frozen(eq=False)
class Tool:
    """A function that a model may call, with the name, description and schema that the model sees.

    Use `Tool.from_function` to derive these from a function, or pass the function itself to an agent. Make a `Tool`
    directly if the schema comes from elsewhere, or if type hints cannot express it:

    ```python
    schema = {"type": "object", "properties": {"path": {"type": "string", "pattern": "^/"}}, "required": ["path"]}
    tool = Tool("list_files", "Lists the files in a folder.", schema, list_files)
    ```

    Args:
        name: The name of the tool, a text that is not empty. Requests contain a version of it that all servers accept.
        description: What the tool does, for the model. It may be empty.
        parameters: The JSON schema of the arguments, which has to describe an object. The arguments that a model sends
            are validated against it. Servers receive a simplified version that all of them can process.
        function: The async or plain function. It is called with the arguments as keywords, which are plain JSON values.
            It can also take the `ToolContext`. If its arguments may have any names, the context has to be the first
            parameter, and positional-only: `async def call(context: ToolContext, /, **arguments)`.
        annotations: Further information about the tool, such as the hints of an MCP server. An `approve` callback can
            read it. Default: none.
        idempotent: Whether making the same call twice has the same effect as making it once. If so, a resumed run makes
            a call again that had started before the interruption and may not have ended. The hint `idempotentHint` in
            `annotations` means the same. Default: False.
        server: The name of the server that the tool comes from. It becomes part of the tool's name in a run where
            several tools have the same name. Default: none.
        timeout: The time limit of a call in seconds. The default, "agent", stands for the agent's `tool_timeout`. None
            means no limit. The function can then enforce one itself, for example because a part of its work should not
            count; `ToolContext.tool_timeout` is the agent's limit.

    Raises:
        LLMValidationError: An argument has the wrong type, or the schema does not describe an object.
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
    idempotent: bool = attrs.field(default=False, kw_only=True, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise LLMValidationError(f"a tool's name must be a non-empty text, not {self.name!r}", hint="pass a name")
        if not isinstance(self.description, str):
            raise self._invalid(f"its description must be a text, not {self.description!r}", "it may be empty")
        if not callable(self.function):
            raise self._invalid(f"its function cannot be called: {self.function!r}", "pass an async or plain function")
        if not isinstance(self.parameters, Mapping):
            raise self._invalid(f"its parameters must be a JSON schema, not {self.parameters!r}", "pass a dict")
        if self.timeout != "agent":
            check_seconds(f"timeout of tool {self.name!r}", self.timeout)
        check_bool(f"idempotent of tool {self.name!r}", self.idempotent)
        try:
            _ = self.sent_parameters
        except (ValueError, TypeError, RecursionError) as exc:
            raise self._invalid(f"its parameters cannot be sent: {exc}", "pass the JSON schema of an object") from exc

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float | Literal["agent"] | None = "agent",
        idempotent: bool = False,
    ) -> Self:
        """Makes a tool from the type hints and the docstring of a function.

        Before a call, the arguments are converted to the annotated types.

        Args:
            function: An async or plain function whose parameters all have type hints.
            name: The name of the tool. Default: the name of the function.
            description: What the tool does. Default: the docstring up to its first section.
            timeout: The time limit of a call in seconds, "agent" or None; see `Tool`.
            idempotent: Whether making the same call twice has the same effect as making it once; see `Tool`.

        Raises:
            LLMValidationError: The object is not a function, or a parameter has no type hint, has a type that JSON
                cannot express, or cannot be passed by keyword.
        """
        signature = read_signature(function, injected=ToolContext, name=name)
        return cls(
            signature.name,
            signature.description if description is None else description,
            signature.schema,
            function,
            timeout=timeout,
            idempotent=idempotent,
            _convert=signature.convert,
        )

    @cached_property
    def sent_parameters(self) -> Mapping[str, Any]:
        """The simplified version of `parameters` that servers and models receive, as plain JSON."""
        return _plain_json_copy(simplify_definition(self.parameters))

    @cached_property
    def context_names(self) -> tuple[str, ...]:
        """The names of the parameters that receive the `ToolContext`."""
        return parameters_of_type(self.function, ToolContext)

    @cached_property
    def takes_context_first(self) -> bool:
        """True if the function's first parameter is positional-only and receives the `ToolContext`."""
        return first_parameter_is(self.function, ToolContext)

    @cached_property
    def is_async(self) -> bool:
        """True if the function runs in the event loop, False if it runs in a thread."""
        return inspect.iscoroutinefunction(self.function)

    @cached_property
    def coercer(self) -> Coercer:
        """Repairs arguments of the wrong JSON type where the schema leaves only one way to read them."""
        return Coercer(self.parameters)

    @cached_property
    def convert(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Converts JSON values to keyword arguments. A `ValueError` describes a mistake and its place."""
        if self._convert is not None:
            return self._convert
        simplified = _plain_json_copy(simplify_parameters(self.parameters))
        return build_validator(self.parameters, simplified, owner=f"tool {self.name!r}")

    @property
    def is_idempotent(self) -> bool:
        """Whether a call may be made again: `idempotent` is set, or the annotations have `idempotentHint`."""
        return self.idempotent or self.annotations.get("idempotentHint") is True

    @property
    def has_converter(self) -> bool:
        """Whether the tool was created with its own converter. If not, the first `convert` imports jsonschema."""
        return self._convert is not None

    def _invalid(self, reason: str, hint: str) -> LLMValidationError:
        return LLMValidationError(f"tool {self.name!r}: {reason}", hint=hint)


@attrs.frozen
class ToolCall:
    """A tool call that a model has requested."""

    id: str
    """The id of the call, which is unique within its reply: the one that the server gave it, or a new one if that was
    missing or taken."""
    name: str
    """The name of the tool in this run, or the name that the model used if no tool has it."""
    arguments: Mapping[str, Any] | None
    """The arguments as JSON values, or None if they could not be read."""
    tool: Tool | None = attrs.field(default=None, repr=False)
    """The tool, or None if no tool has this name."""
    repaired: bool = False
    """Whether the model wrote the name or the arguments with small mistakes that were corrected; see
    `Agent(repair_calls=...)`."""


@runtime_checkable
class ToolProvider(Protocol):
    """An object that provides tools, which may differ from run to run.

    An agent accepts such an object among its tools, and calls `list_tools` at the start of each run. If the object also
    has a method `async new_tools()`, the agent calls that method before each round, and adds the tools that it returns
    at the end of the run's tools. Tools that the run already has are ignored, so the method may return them again.
    """

    async def list_tools(self) -> Sequence[Tool]:
        """Returns the tools for the run that is starting."""
        ...


@runtime_checkable
class GrowingToolProvider(ToolProvider, Protocol):
    """A `ToolProvider` that may add tools during a run."""

    async def new_tools(self) -> Sequence[Tool]:
        """Returns the tools that have been added since `list_tools`. It is called often, and should return quickly."""
        ...


def _plain_json_copy(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a schema as plain JSON.

    Raises:
        TypeError: The schema has a value that JSON does not have.
    """
    decoded: dict[str, Any] = msgspec.json.decode(encode_body(schema))
    return decoded


def as_tool(tool_or_function: Tool | Callable[..., Any]) -> Tool:
    """Returns a tool unchanged, and makes one from a function.

    Raises:
        LLMValidationError: The object is neither, or the function cannot be a tool.
    """
    return tool_or_function if isinstance(tool_or_function, Tool) else Tool.from_function(tool_or_function)
