"""Signatures: the schema of a function's parameters, and its arguments made of JSON values."""

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

from lmbridge.agent.docstrings import read_docstring
from lmbridge.client.schemas import fault
from lmbridge.errors import LLMValidationError

_GIVE: Final = "give an async or plain function, a Tool, or an object with `async list_tools()`"
_BY_HAND: Final = "or make a Tool(name, description, parameters, function) with a schema of your own"
_KEYWORDS: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@attrs.frozen
class Signature:
    """What is known of a function."""

    name: str
    description: str
    schema: dict[str, Any]
    """Of the parameters: an object with no other properties."""
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Makes keywords of JSON values; raises a ValueError that says what is wrong where."""


def read_signature(function: Callable[..., Any], *, hidden: type, name: str | None = None) -> Signature:
    """Reads a function's type hints and docstring.

    Args:
        function: A function, a bound method, a partial, or an object that can be called.
        hidden: The type of parameters that no model fills in.
        name: What it is called. Default: the function's own name.

    Raises:
        LLMValidationError: it cannot be called with keywords out of JSON.
    """
    if not callable(function) or inspect.isclass(function):
        raise LLMValidationError(f"{function!r} is no tool", hint=_GIVE)
    code = _code(function)
    name = name or _name(code)
    try:
        hints = _hints(function, name)
        parameters = {each: hint for each, hint in hints.items() if not _is_one(hint.annotation, hidden)}
        fields = [_field(each, hint) for each, hint in parameters.items()]
        struct = msgspec.defstruct(
            re.sub(r"\W", "_", name), fields, kw_only=True, forbid_unknown_fields=True, module=__name__
        )
        schema = _schema(struct)
    except (TypeError, NameError, AttributeError, SyntaxError) as exc:
        reason = str(exc).rpartition("\n")[2]  # msgspec's lines before say how to extend msgspec
        raise _refused(name, reason, f"annotate its parameters with types that JSON has, {_BY_HAND}", exc) from exc
    said = read_docstring(code.__doc__)
    for each, hint in parameters.items():
        schema["properties"][each] = _described(schema["properties"][each], hint, said.parameters.get(each))
    return Signature(name, said.description, schema, functools.partial(_convert, struct))


def injected(function: Callable[..., Any], hidden: type) -> tuple[str, ...]:
    """The parameters of a type that no model fills in; none, if the hints cannot be read."""
    try:
        hints = _hints(function, "")
    except (LLMValidationError, TypeError, NameError, AttributeError, SyntaxError, ValueError):
        return ()  # of a tool made by hand nothing has to be known
    return tuple(name for name, hint in hints.items() if _is_one(hint.annotation, hidden))


@attrs.frozen
class _Hint:
    annotation: Any
    default: Any  # inspect.Parameter.empty for none


def _code(function: Callable[..., Any]) -> Any:
    """What has the name, the docstring and the hints of something that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _name(code: Any) -> str:
    owner, _, name = getattr(code, "__qualname__", "").rpartition(".")
    if name == "__call__":
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", owner.rpartition(".")[2]).lower()
    if not name or name == "<lambda>":
        hint = "write a function, or give it one: Tool.from_function(function, name=...)"
        raise LLMValidationError("a tool has no name: it is a lambda, or an object without one", hint=hint)
    return name


def _hints(function: Callable[..., Any], name: str) -> dict[str, _Hint]:
    """The parameters that are filled in by keyword.

    Raises:
        LLMValidationError: there are others, or some without a type hint.
    """
    code = _code(function)
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise _refused(name, "it is a generator", "return a list, or a text")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as exc:  # some builtins
        raise _refused(name, str(exc), f"write a function around it, {_BY_HAND}", exc) from exc
    bound = function.keywords if isinstance(function, functools.partial) else {}
    wanted = {each: parameter for each, parameter in parameters.items() if each not in bound}
    for each, parameter in wanted.items():
        if parameter.kind not in _KEYWORDS:
            hint = f"name its parameters (functools.wraps keeps those of what a decorator wraps), {_BY_HAND}"
            raise _refused(name, f"its parameter {str(parameter).partition(':')[0]!r} has no place in JSON", hint)
        if parameter.annotation is parameter.empty:
            raise _refused(name, f"its parameter {each!r} has no type hint", f"annotate it, {_BY_HAND}")
    holder = types.SimpleNamespace(__annotations__={each: one.annotation for each, one in wanted.items()})
    scope = getattr(inspect.unwrap(code), "__globals__", {})
    annotations = typing.get_type_hints(holder, globalns=scope, include_extras=True)
    return {each: _Hint(annotations[each], one.default) for each, one in wanted.items()}


def _is_one(annotation: Any, hidden: type) -> bool:
    """Whether it is the type, or that or None."""
    return annotation is hidden or (
        typing.get_origin(annotation) in (Union, types.UnionType) and hidden in typing.get_args(annotation)
    )


def _field(name: str, hint: _Hint) -> tuple[str, Any] | tuple[str, Any, Any]:
    """A field that stays unset where the function has a default: it is the function's to give."""
    if hint.default is inspect.Parameter.empty:
        return name, hint.annotation
    return name, Union[hint.annotation, msgspec.UnsetType], msgspec.UNSET  # noqa: UP007 - not every hint knows `|`


def _schema(struct: type[msgspec.Struct]) -> dict[str, Any]:
    whole = msgspec.json.schema(struct)
    definitions = whole["$defs"]
    schema: dict[str, Any] = definitions.pop(whole["$ref"].removeprefix("#/$defs/"))
    schema.pop("title", None)
    return schema | ({"$defs": definitions} if definitions else {})


def _described(part: dict[str, Any], hint: _Hint, said: str | None) -> dict[str, Any]:
    """A parameter's schema, with its description and its default where these are known."""
    texts = [each for each in getattr(hint.annotation, "__metadata__", ()) if isinstance(each, str)]
    description = part.get("description") or next(iter(texts), said)
    part = {**part, "description": description} if description else dict(part)
    part.pop("default", None)  # msgspec's: that the parameter is not set
    with contextlib.suppress(TypeError, ValueError):  # JSON has no such value: the model need not know it
        if hint.default is not inspect.Parameter.empty and msgspec.json.encode(hint.default) != b"null":  # nor NaN
            part["default"] = msgspec.to_builtins(hint.default)
    return part


def _convert(struct: type[msgspec.Struct], values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        arguments = msgspec.convert(dict(values), struct, str_keys=True)
    except msgspec.ValidationError as exc:
        raise ValueError(": ".join(fault(exc))) from exc
    given = ((name, getattr(arguments, name)) for name in struct.__struct_fields__)
    return {name: value for name, value in given if value is not msgspec.UNSET}


def _refused(name: str, why: str, hint: str, cause: Exception | None = None) -> LLMValidationError:
    return LLMValidationError(f"{name!r} cannot be a tool: {why}", cause, hint=hint)
