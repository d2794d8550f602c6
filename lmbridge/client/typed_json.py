"""`TypedJson`: the schema of a Python type, and how a JSON text becomes an instance of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from lmbridge.client.type_schemas import json_schema
from lmbridge.client.type_stand_ins import read_stand_in, supported_type

T = TypeVar("T")


class TypedJson(Generic[T]):
    """The JSON form of one type.

    Args:
        type_: The type: a class, or a form such as `list[int]` or `Cat | Dog`.

    Attributes:
        schema: The JSON schema of the type.

    Raises:
        TypeError: The type, or a part of it, cannot be expressed in JSON.
        NameError: An annotation of a class refers to a name that does not exist.
    """

    def __init__(self, type_: Any) -> None:
        self._supported_type = supported_type(type_)
        self.schema: Mapping[str, Any] = json_schema(type_)
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(self._supported_type, dec_hook=read_stand_in)

    def decode(self, text: str) -> T:
        """Returns the instance that a JSON text stands for.

        Raises:
            ValueError: The text is not valid JSON, or does not fit the type.
        """
        return self._decoder.decode(text)
