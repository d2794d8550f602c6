"""Reads the signature of a Python function: the JSON schema of its parameters, and how to convert JSON values to them.

Both come from a `msgspec.Struct` that is built with one field for each parameter: msgspec generates its schema, and
converts values to it, so that the two always agree. `type_stand_ins` adds the types that msgspec does not know, such as
pydantic models. Pydantic could do all of this, but it is a heavy import for a library that needs nothing else of it,
and validators written by hand would have to be kept in step with the schema.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final, Union

import attrs
import msgspec

from lmbridge._docstrings import read_docstring
from lmbridge.agent.tool_results import as_plain_json
from lmbridge.client.type_mismatches import describe_fault
from lmbridge.client.type_schemas import description_of, json_schema, with_literals_as_written
from lmbridge.client.type_stand_ins import convert, supported_type
from lmbridge.errors import LLMValidationError

_ACCEPTED_TOOLS_HINT: Final = "pass an async or plain function, a Tool, or an object with `async list_tools()`"
_OWN_SCHEMA_HINT: Final = "or make a Tool(name, description, parameters, function) with your own schema"
_KEYWORD_KINDS: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@attrs.frozen
class FunctionSignature:
    """The parts of a function from which a tool is made."""

    name: str
    """The name of the tool."""
    description: str
    """The text of the docstring before its first section; empty without a docstring."""
    schema: dict[str, Any]
    """The JSON schema of the parameters: an object that accepts no other properties."""
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Converts JSON values to keyword arguments. A `ValueError` describes a mistake and its place."""


@attrs.frozen
class _ParameterHint:
    """The type hint and the default of one parameter."""

    annotation: Any
    """The type hint, after strings have been resolved."""
    default: Any
    """The default value, or `inspect.Parameter.empty` if the parameter is required."""


def read_signature(function: Callable[..., Any], *, injected: type, name: str | None = None) -> FunctionSignature:
    """Reads the type hints and the docstring of a function.

    Args:
        function: A function, a bound method, a partial, or an object with `__call__`.
        injected: Parameters of this type are filled in by the library, and are left out of the schema.
        name: The name of the tool. Default: the name of the function.

    Raises:
        LLMValidationError: The function cannot be called with keyword arguments made from JSON.
    """
    if not callable(function) or inspect.isclass(function):
        raise LLMValidationError(f"{function!r} is not a tool", hint=_ACCEPTED_TOOLS_HINT)
    code = _underlying_function(function)
    name = name or _default_name(code)
    try:
        hints = _parameter_hints(function, name)
        parameters = {each: hint for each, hint in hints.items() if not _accepts(hint.annotation, injected)}
        fields = [_struct_field(each, hint) for each, hint in parameters.items()]
        struct = msgspec.defstruct(
            re.sub(r"\W", "_", name), fields, kw_only=True, forbid_unknown_fields=True, module=__name__
        )
        schema = _struct_schema(struct)
    except (TypeError, NameError, AttributeError, SyntaxError) as exc:
        # The lines of msgspec's message before its last one explain how to extend msgspec.
        reason = str(exc).rpartition("\n")[2]
        hint_text = f"annotate its parameters with types that JSON has, {_OWN_SCHEMA_HINT}"
        raise _unusable_function(name, reason, hint_text, exc) from exc
    docstring = read_docstring(code.__doc__)
    for each, hint in parameters.items():
        schema["properties"][each] = _annotated(schema["properties"][each], hint, docstring.parameters.get(each))
    return FunctionSignature(name, docstring.description, schema, functools.partial(_convert_arguments, struct))


def parameters_of_type(function: Callable[..., Any], wanted: type) -> tuple[str, ...]:
    """Returns the names of the parameters that are annotated with a type, or with a union that contains it.

    The result is empty if the hints of the function cannot be read. A `Tool` with its own schema does not need them.
    """
    try:
        hints = _parameter_hints(function, "")
    except (LLMValidationError, TypeError, NameError, AttributeError, SyntaxError, ValueError):
        return ()
    return tuple(name for name, hint in hints.items() if _accepts(hint.annotation, wanted))


def first_parameter_is(function: Callable[..., Any], wanted: type) -> bool:
    """Returns whether the first parameter is positional-only and annotated with a type, or with a union that has it.

    The result is False for a function whose hints cannot be read.
    """
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except (TypeError, NameError, AttributeError, SyntaxError, ValueError):
        return False
    first = next(iter(parameters.values()), None)
    return first is not None and first.kind is first.POSITIONAL_ONLY and _accepts(first.annotation, wanted)


def _underlying_function(function: Callable[..., Any]) -> Any:
    """Returns the object that carries the name, the docstring and the hints of a callable."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _default_name(code: Any) -> str:
    # A program that makes functions in a loop names them by setting `__name__`, which does not change `__qualname__`.
    name: str = getattr(code, "__name__", "")
    if name == "__call__":
        # A callable object is named after its class, in snake case.
        owner = getattr(code, "__qualname__", "").rpartition(".")[0].rpartition(".")[2]
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", owner).lower()
    if not name or name == "<lambda>":
        hint = "write a function, or pass a name: Tool.from_function(function, name=...)"
        raise LLMValidationError("a tool has no name: it is a lambda, or an object without a name", hint=hint)
    return name


def _parameter_hints(function: Callable[..., Any], name: str) -> dict[str, _ParameterHint]:
    """Returns the parameters that can be passed by keyword and are not bound by a partial.

    Raises:
        LLMValidationError: A parameter cannot be passed by keyword, or has no type hint.
    """
    code = _underlying_function(function)
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise _unusable_function(name, "it is a generator", "return a list or a string")
    try:
        all_parameters = inspect.signature(function).parameters
    except ValueError as exc:
        # Some builtins have no signature.
        raise _unusable_function(name, str(exc), f"write a function around it, {_OWN_SCHEMA_HINT}", exc) from exc
    bound = function.keywords if isinstance(function, functools.partial) else {}
    parameters = {each: parameter for each, parameter in all_parameters.items() if each not in bound}
    for each, parameter in parameters.items():
        if parameter.kind not in _KEYWORD_KINDS:
            hint = f"name its parameters (functools.wraps keeps those of a wrapped function), {_OWN_SCHEMA_HINT}"
            reason = f"its parameter {str(parameter).partition(':')[0]!r} cannot be passed by keyword"
            raise _unusable_function(name, reason, hint)
        if parameter.annotation is parameter.empty:
            reason = f"its parameter {each!r} has no type hint"
            raise _unusable_function(name, reason, f"annotate it, {_OWN_SCHEMA_HINT}")
    # Only the parameters are resolved: an unknown name in the return type does not matter.
    holder = types.SimpleNamespace(__annotations__={each: one.annotation for each, one in parameters.items()})
    scope = getattr(inspect.unwrap(code), "__globals__", {})
    annotations = typing.get_type_hints(holder, globalns=scope, include_extras=True)
    return {each: _ParameterHint(annotations[each], one.default) for each, one in parameters.items()}


def _accepts(annotation: Any, wanted: type) -> bool:
    """Returns whether an annotation is the wanted type, or a union with it."""
    return annotation is wanted or (
        typing.get_origin(annotation) in (Union, types.UnionType) and wanted in typing.get_args(annotation)
    )


def _struct_field(name: str, hint: _ParameterHint) -> tuple[str, Any] | tuple[str, Any, Any]:
    """Returns the field of a parameter. If it has a default, it may stay unset: the function applies the default."""
    if hint.default is inspect.Parameter.empty:
        return name, supported_type(hint.annotation)
    # Some annotations, such as strings, do not support the `|` operator.
    return name, Union[supported_type(hint.annotation), msgspec.UnsetType], msgspec.UNSET  # noqa: UP007


def _struct_schema(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Returns the JSON schema of a struct, with the struct itself at the top instead of behind a reference."""
    generated = json_schema(struct)
    definitions = generated["$defs"]
    schema: dict[str, Any] = definitions.pop(generated["$ref"].removeprefix("#/$defs/"))
    schema.pop("title", None)
    return schema | ({"$defs": definitions} if definitions else {})


def _annotated(part: dict[str, Any], hint: _ParameterHint, docstring_entry: str | None) -> dict[str, Any]:
    """Returns the schema of a parameter with its description and its default, if they are known."""
    description = part.get("description") or description_of(hint.annotation) or docstring_entry
    part = with_literals_as_written(part, hint.annotation)
    if description:
        part["description"] = description
    # The default that msgspec generated is UNSET, not the default of the function.
    part.pop("default", None)
    # A default that JSON cannot represent is left out: the function applies it, and the model need not know it.
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        if hint.default is not inspect.Parameter.empty:
            default = as_plain_json(hint.default)
            # msgspec encodes NaN as null.
            if default is None or msgspec.json.encode(default) != b"null":
                part["default"] = default
    return part


def _convert_arguments(struct: type[msgspec.Struct], values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        converted = convert(dict(values), struct)
    except msgspec.ValidationError as exc:
        raise ValueError(": ".join(describe_fault(exc))) from exc
    fields = ((name, getattr(converted, name)) for name in struct.__struct_fields__)
    return {name: value for name, value in fields if value is not msgspec.UNSET}


def _unusable_function(name: str, reason: str, hint: str, cause: Exception | None = None) -> LLMValidationError:
    return LLMValidationError(f"{name!r} cannot be a tool: {reason}", cause, hint=hint)
