"""Types that pydantic reads: models of pydantic 2 and 1, its other types, and types with its constraints.

pydantic is never imported here, because lmbridge does not depend on it, and a program that does not import it must not
pay for it. Its models are recognized by their methods, and its other types only if the program has imported pydantic.
"""

from __future__ import annotations

import functools
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec

from lmbridge.client.type_mismatches import LISTED_FAULTS, ValueFaultError

_PYDANTIC_PACKAGES: Final = ("pydantic", "pydantic_core", "annotated_types")
_PYDANTIC_METHODS: Final = ("__pydantic_core_schema__", "__get_pydantic_core_schema__")


def is_read_by_pydantic(annotation: Any) -> bool:
    """Returns whether a type is a pydantic model, another type of pydantic, or has constraints of pydantic."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if hasattr(annotation, "model_json_schema") and hasattr(annotation, "model_validate_json"):
            return True
        if _is_old_model(annotation):
            return True
        return "pydantic" in sys.modules and any(hasattr(annotation, name) for name in _PYDANTIC_METHODS)
    if typing.get_origin(annotation) is not Annotated or "pydantic" not in sys.modules:
        return False
    metadata = (each for each in typing.get_args(annotation)[1:] if _package_of(each) in _PYDANTIC_PACKAGES)
    # A `Field` that has no constraints describes the value, and does not validate it.
    return any(getattr(each, "metadata", True) for each in metadata)


def _is_old_model(annotation: type) -> bool:
    """Returns whether a class is a model of pydantic 1, which is also in `pydantic.v1`."""
    # A model of pydantic 2 has the attributes of pydantic 1 as well, and warns about their use.
    return not hasattr(annotation, "model_fields") and all(
        hasattr(annotation, name) for name in ("__fields__", "parse_raw", "schema")
    )


def _package_of(value: object) -> str:
    return type(value).__module__.partition(".")[0]


class PydanticReader:
    """Reads values with pydantic: a model, a pydantic dataclass, or a type with pydantic's constraints."""

    parts: Sequence[Any] = ()

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation
        self._is_model = hasattr(annotation, "model_json_schema") and hasattr(annotation, "model_validate_json")
        # Whether the type is a model of pydantic 1.
        self._is_old = not self._is_model and isinstance(annotation, type) and _is_old_model(annotation)

    @property
    def field_names(self) -> set[str]:
        """The names and aliases of the fields of a model; none for any other type."""
        fields = getattr(self._annotation, "__fields__" if self._is_old else "model_fields", {})
        return {*fields, *(getattr(each, "alias", None) or "" for each in fields.values())}

    @functools.cached_property
    def _adapter(self) -> Any:
        return sys.modules["pydantic"].TypeAdapter(self._annotation)

    def schema(self, _parts: Sequence[Mapping[str, Any]], name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Returns the schema that pydantic generates, and its definitions under names that begin with `name`."""
        template = f"#/$defs/{name}.{{model}}"
        try:
            if self._is_old:
                make = self._annotation.schema
            else:
                make = self._annotation.model_json_schema if self._is_model else self._adapter.json_schema
            schema = dict(make(ref_template=template))
        except Exception as exc:
            # pydantic raises errors of several classes for types that JSON does not have.
            raise TypeError(str(exc).partition("\n")[0]) from exc
        definitions = schema.pop("definitions" if self._is_old else "$defs", {})
        return schema, {f"{name}.{each}": part for each, part in definitions.items()}

    def read(self, value: Any) -> Any:
        """Converts a JSON value.

        Raises:
            ValueFaultError: The value does not fit the type.
        """
        # The value is read as a JSON text, in which even a strict model accepts a string as a date.
        text = msgspec.json.encode(value)
        try:
            if self._is_old:
                return self._annotation.parse_raw(text)
            return self._annotation.model_validate_json(text) if self._is_model else self._adapter.validate_json(text)
        except ValueError as exc:
            raise _pydantic_fault(exc) from exc


def _pydantic_fault(error: Exception) -> ValueFaultError:
    errors = getattr(error, "errors", None)
    details: Any = errors() if callable(errors) else ()
    if not details:
        return ValueFaultError("", str(error))
    faults = [(_pydantic_path(each.get("loc", ())), str(each.get("msg", ""))) for each in details]
    path, fault = faults[0]
    further = [f"{where or 'as a whole'}: {text}" for where, text in faults[1:LISTED_FAULTS]]
    return ValueFaultError(path, "; ".join([fault, *further]))


def _pydantic_path(location: Iterable[int | str]) -> str:
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in location)
