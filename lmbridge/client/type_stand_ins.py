"""Stand-ins for types that msgspec does not support, such as pydantic models, paths and unions of classes.

msgspec generates the JSON schema of most types, and converts JSON values to them. It does not know pydantic models,
paths, unions of several classes, such as `Cat | Dog`, or enums with values of several types. Wherever one of these
occurs, the type that is passed to msgspec has a stand-in for it: a class whose `reader` provides the schema and
converts the value. A class with a field of such a type is represented by a stand-in as well, because the annotation of
the field cannot be changed: msgspec reads the fields into a struct, from which the constructor then creates the
instance.

The alternative was pydantic's `TypeAdapter` for everything. But lmbridge does not depend on pydantic, and a program
that does not import it must not pay for it.
"""

from __future__ import annotations

import enum
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple, NotRequired, Protocol, Required, TypeVar, Union

import msgspec

from lmbridge.client.pydantic_types import PydanticReader, is_read_by_pydantic
from lmbridge.client.type_mismatches import LISTED_FAULTS, ValueFaultError, as_value_fault, describe_alternative

_T = TypeVar("_T")


class _TypeReader(Protocol):
    """Provides the JSON schema of a type that msgspec does not support, and converts values to the type."""

    @property
    def parts(self) -> Sequence[Any]:
        """The types whose schemas are parts of the schema of this type."""
        ...

    def schema(self, parts: Sequence[Mapping[str, Any]], name: str, /) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Returns the schema, and definitions that it refers to, whose names have to begin with `name`."""
        ...

    def read(self, value: Any, /) -> Any:
        """Converts a JSON value. Raises a `ValueError` if the value does not fit."""
        ...


class StandInType(type):
    """The metaclass of stand-ins.

    Any object counts as an instance of a stand-in, because msgspec checks the class of what a reader has returned.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return True


def _stand_in(reader: _TypeReader) -> Any:
    return StandInType("StandIn", (), {"reader": reader})


# Reading values


def convert(value: Any, supported: Any) -> Any:
    """Converts a JSON value to an instance of a type.

    Args:
        value: The value, as a JSON decoder returns it.
        supported: The type, as `supported_type` returns it.

    Raises:
        msgspec.ValidationError: The value does not fit the type.
    """
    return msgspec.convert(value, supported, str_keys=True, dec_hook=read_stand_in)


def read_stand_in(type_: Any, value: Any) -> Any:
    """Converts a value for msgspec to the type that a stand-in represents."""
    if not isinstance(type_, StandInType):
        raise NotImplementedError
    reader: _TypeReader = type_.__dict__["reader"]
    return reader.read(value)


# Types that msgspec supports


def cached_for_type(function: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """Caches the results of a function that takes a type.

    `lru_cache` alone would take `Cat | Dog` for `Dog | Cat`, which are equal. But the first alternative that fits is
    the one that counts.
    """
    cached = functools.lru_cache(maxsize=512)(lambda annotation, _order: function(annotation))

    @functools.wraps(function)
    def look_up(annotation: Any) -> _T:
        return cached(annotation, _order_of(annotation))

    return look_up


def _order_of(annotation: Any) -> Any:
    """Returns a value that differs between equal types whose parts are in a different order."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        # Equal values, such as 1 and True, are different ones in a Literal.
        return tuple((type(each), each) for each in arguments)
    parts = arguments[:1] if origin is Annotated else arguments
    return tuple(map(_order_of, parts)) if parts else id(annotation)


def supported_type(annotation: Any) -> Any:  # noqa: PLR0911 - one return for each kind of type
    """Returns a type with stand-ins for the parts that msgspec does not support; the same type if it supports all.

    Raises:
        NameError: An annotation of a class refers to a name that does not exist.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if is_read_by_pydantic(annotation):
        return _pydantic_stand_in(annotation)
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return _stand_in(_PathReader(annotation))
    if _is_unsupported_enum(annotation):
        return _enum_stand_in(annotation)
    if has_fields(annotation) or has_fields(origin):
        if _needs_stand_in(annotation if origin is None else origin):
            return _class_stand_in(annotation)
        if origin is None:
            return annotation
    if origin is Annotated:
        inner = supported_type(arguments[0])
        return annotation if inner is arguments[0] else Annotated[(inner, *arguments[1:])]
    if origin is None or origin is typing.Literal:
        return annotation
    supported = [supported_type(each) for each in arguments]
    is_changed = any(new is not old for new, old in zip(supported, arguments, strict=True))
    if origin in (Union, types.UnionType):
        rebuilt = Union[tuple(supported)] if is_changed else annotation  # noqa: UP007 - the members are computed
        return rebuilt if _msgspec_supports(rebuilt) else _stand_in(_UnionReader(supported))
    return origin[tuple(supported)] if is_changed else annotation


def _msgspec_supports(annotation: Any) -> bool:
    try:
        msgspec.json.Decoder(annotation)
    # msgspec raises a NotImplementedError for an enum with an integer of more than 64 bits.
    except (TypeError, NotImplementedError):
        return False
    return True


def _is_unsupported_enum(annotation: Any) -> bool:
    """Returns whether a type is an enum whose values are neither all strings nor all integers of 64 bits."""
    return isinstance(annotation, enum.EnumType) and len(annotation) > 0 and not _msgspec_supports(annotation)


def has_fields(annotation: Any) -> bool:
    """Returns whether a type is a dataclass, an attrs class, a TypedDict, a named tuple or a msgspec.Struct."""
    if not isinstance(annotation, type) or isinstance(annotation, types.GenericAlias):
        return False
    return (
        typing.is_typeddict(annotation)
        or any(hasattr(annotation, name) for name in ("__dataclass_fields__", "__attrs_attrs__", "__struct_fields__"))
        or (issubclass(annotation, tuple) and hasattr(annotation, "_fields"))
    )


@functools.lru_cache(maxsize=512)
def _needs_stand_in(class_: type) -> bool:
    """Returns whether a field of a class, or of a class within it, has a type that msgspec does not support."""
    return any(
        _is_unsupported(annotation) for each in classes_within([class_]) for annotation in annotations_of(each).values()
    )


def _is_unsupported(annotation: Any) -> bool:
    """Returns whether msgspec does not support an annotation, without looking at the fields of the classes in it."""
    if is_read_by_pydantic(annotation):
        return True
    if (isinstance(annotation, type) and issubclass(annotation, PurePath)) or _is_unsupported_enum(annotation):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return False
    if origin in (Union, types.UnionType) and not _msgspec_supports(annotation):
        return True
    return any(_is_unsupported(each) for each in (arguments[:1] if origin is Annotated else arguments))


def classes_within(annotations: Iterable[Any]) -> list[type]:
    """Returns each class that has fields and occurs in some types, or in the fields of such classes, once."""
    found: dict[type, None] = {}
    remaining = list(annotations)
    while remaining:
        annotation = remaining.pop()
        if is_read_by_pydantic(annotation):
            continue
        if has_fields(annotation):
            if annotation not in found:
                found[annotation] = None
                remaining += annotations_of(annotation).values()
            continue
        origin = typing.get_origin(annotation)
        if origin is not None and has_fields(origin):
            # A generic class: its fields are described, and its parameters may contain other classes.
            remaining.append(origin)
        if origin is not typing.Literal:
            remaining += typing.get_args(annotation)
    return list(found)


@functools.lru_cache(maxsize=512)
def annotations_of(class_: type) -> Mapping[str, Any]:
    """Returns the annotations of a class, without `Required` and similar wrappers."""
    hints = typing.get_type_hints(class_, include_extras=True)
    return {name: _unwrapped(annotation) for name, annotation in hints.items()}


def _unwrapped(annotation: Any) -> Any:
    while typing.get_origin(annotation) in (Required, NotRequired, typing.Final, typing.ClassVar):
        annotation = typing.get_args(annotation)[0]
    return annotation


# The readers of stand-ins


class _PathReader:
    """Reads strings as paths."""

    parts: Sequence[Any] = ()

    def __init__(self, class_: type[PurePath]) -> None:
        self._class = class_

    def schema(self, _parts: Sequence[Mapping[str, Any]], _name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        return {"type": "string"}, {}

    def read(self, value: Any) -> PurePath:
        if not isinstance(value, str):
            raise ValueFaultError("", f"Expected `str`, got `{type(value).__name__}`")
        return self._class(value)


class _EnumReader:
    """Reads a member of an enum by its value, or by its name if JSON cannot express or distinguish all values."""

    parts: Sequence[Any] = ()

    def __init__(self, class_: enum.EnumType) -> None:
        self._members: list[Any] = list(class_)
        self._values = [_json_scalar(each.value) for each in self._members]
        others = [self._values[:number] for number in range(len(self._values))]
        if any(
            value is msgspec.UNSET or any(_is_same_scalar(value, each) for each in earlier)
            for value, earlier in zip(self._values, others, strict=True)
        ):
            self._values = [each.name for each in self._members]

    def schema(self, _parts: Sequence[Mapping[str, Any]], _name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        return {"enum": list(self._values)}, {}

    def read(self, value: Any) -> Any:
        for member, expected in zip(self._members, self._values, strict=True):
            if _is_same_scalar(value, expected):
                return member
        raise ValueFaultError("", f"Invalid enum value {value!r}")


def _json_scalar(value: object) -> Any:
    """Returns a value as JSON has it, such as a date as a string, or UNSET if JSON has no such scalar."""
    if isinstance(value, bytes | bytearray | memoryview):
        return msgspec.UNSET
    try:
        plain = msgspec.to_builtins(value)
    except (TypeError, ValueError):
        return msgspec.UNSET
    if isinstance(plain, float) and not math.isfinite(plain):
        return msgspec.UNSET
    if isinstance(plain, int) and not -(2**63) <= plain < 2**63:
        return msgspec.UNSET
    return plain if plain is None or isinstance(plain, str | int | float) else msgspec.UNSET


def _is_same_scalar(one: object, other: object) -> bool:
    # In Python, True equals 1, and in JSON it does not.
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class _UnionReader:
    """Reads a value as the first member of a union that it fits.

    For an object, the members that know most of its fields are tried first, because most classes ignore fields that
    they do not know.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.parts: Sequence[Any] = list(members)
        self._fields = [_field_names(each) for each in members]

    def schema(self, parts: Sequence[Mapping[str, Any]], _name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        return {"anyOf": [dict(each) for each in parts]}, {}

    def read(self, value: Any) -> Any:
        faults: list[str] = []
        keys = set(value) if isinstance(value, dict) else set()
        order = sorted(range(len(self.parts)), key=lambda number: len(keys - self._fields[number]))
        for number in order:
            try:
                return convert(value, self.parts[number])
            except msgspec.ValidationError as exc:
                faults.append(describe_alternative(exc))
        raise ValueFaultError("", f"No alternative fits ({' or '.join(faults[:LISTED_FAULTS])})")


def _field_names(member: Any) -> set[str]:
    reader = member.__dict__["reader"] if isinstance(member, StandInType) else None
    if isinstance(reader, PydanticReader):
        return reader.field_names
    class_ = reader.class_ if isinstance(reader, _ClassReader) else member
    return set(annotations_of(class_)) if has_fields(class_) else set()


class _ClassReader:
    """Reads an object as an instance of a class that has fields which msgspec does not support.

    Args:
        type_: The class, or a generic class with its parameters, such as `Box[int]`.
    """

    def __init__(self, type_: Any) -> None:
        self.class_: type = typing.get_origin(type_) or type_
        parameters = getattr(self.class_, "__parameters__", ())
        self._full_name = str(type_) if parameters else f"{self.class_.__module__}.{self.class_.__qualname__}"
        self._arguments = dict(zip(parameters, typing.get_args(type_) or parameters, strict=True))

    @functools.cached_property
    def parts(self) -> Sequence[Any]:
        # Created late, because the class may contain itself.
        fields: list[Any] = []
        for field in _constructor_fields(self.class_):
            supported = supported_type(_with_arguments(field.annotation, self._arguments))
            is_required = field.is_required
            optional = (field.name, Union[supported, msgspec.UnsetType], msgspec.UNSET)  # noqa: UP007 - `|` does not accept every type
            fields.append((field.name, supported) if is_required else optional)
        name = re.sub(r"\W", "_", self.class_.__name__)
        struct = msgspec.defstruct(
            name, fields, kw_only=True, module=__name__, namespace={"_described_class": self.class_}
        )
        # msgspec distinguishes classes with the same name by this attribute. It is the same in each run of a program,
        # because the names of definitions are sent.
        struct.__qualname__ = re.sub(r"\W+", "_", self._full_name)
        return (struct,)

    def schema(self, parts: Sequence[Mapping[str, Any]], _name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        return dict(parts[0]), {}

    def read(self, value: Any) -> Any:
        struct = self.parts[0]
        try:
            read = convert(value, struct)
        except msgspec.ValidationError as exc:
            raise as_value_fault(exc) from exc
        fields = {name: getattr(read, name) for name in struct.__struct_fields__}
        return self.class_(**{name: each for name, each in fields.items() if each is not msgspec.UNSET})


def _with_arguments(annotation: Any, arguments: Mapping[Any, Any]) -> Any:
    """Returns the annotation of a field of a generic class, with types in place of the parameters of the class."""
    if isinstance(annotation, typing.TypeVar):
        return arguments.get(annotation, annotation)
    parameters = getattr(annotation, "__parameters__", ())
    if not parameters or (isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)):
        return annotation
    return annotation[tuple(arguments.get(each, each) for each in parameters)]


class _ConstructorField(NamedTuple):
    name: str
    annotation: Any
    is_required: bool


def _constructor_fields(class_: Any) -> Iterator[_ConstructorField]:
    """Yields the fields of a class that its constructor accepts."""
    annotations = annotations_of(class_)
    if typing.is_typeddict(class_):
        for name, annotation in annotations.items():
            yield _ConstructorField(name, annotation, name in class_.__required_keys__)
    elif hasattr(class_, "__attrs_attrs__"):
        for each in class_.__attrs_attrs__:
            if each.init:
                # The default of a field without one is the object NOTHING of attrs, which is recognized by its repr.
                is_required = repr(each.default) == "NOTHING"
                yield _ConstructorField(each.alias or each.name, annotations.get(each.name, Any), is_required)
    elif hasattr(class_, "__dataclass_fields__"):
        import dataclasses  # noqa: PLC0415 - imported by a program that has a dataclass

        for field in dataclasses.fields(class_):
            if field.init:
                is_required = field.default is field.default_factory is dataclasses.MISSING
                yield _ConstructorField(field.name, annotations[field.name], is_required)
    elif hasattr(class_, "__struct_fields__"):
        for info in msgspec.structs.fields(class_):
            yield _ConstructorField(info.name, annotations[info.name], info.required)
    else:
        for name in class_._fields:
            yield _ConstructorField(name, annotations.get(name, Any), name not in class_._field_defaults)


@functools.lru_cache(maxsize=512)
def _enum_stand_in(class_: enum.EnumType) -> Any:
    return _stand_in(_EnumReader(class_))


@cached_for_type
def _class_stand_in(type_: Any) -> Any:
    # pyright does not accept a `cached_property` in place of the property of the protocol.
    return _stand_in(_ClassReader(type_))  # pyright: ignore[reportArgumentType]


def _pydantic_stand_in(annotation: Any) -> Any:
    return _model_stand_in(annotation) if isinstance(annotation, type) else _stand_in(PydanticReader(annotation))


@functools.lru_cache(maxsize=512)
def _model_stand_in(model: type) -> Any:
    return _stand_in(PydanticReader(model))
