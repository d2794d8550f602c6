"""Describes where a value does not fit its type and what is wrong there, in words that a model or a user can act on."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from lmbridge._text import excerpt

_MSGSPEC_FAULT: Final = re.compile(r"(?P<fault>.*) - at (?P<path>`.*`)", re.DOTALL)
LISTED_FAULTS: Final = 3
"""The largest number of mistakes, and of alternatives of a union, that one error text describes."""


class ValueFaultError(ValueError):
    """A value that does not fit a type that a stand-in represents.

    Attributes:
        path: Where the mistake is within the value, such as `.items[2]`; empty if it is the value as a whole.
        fault: What is wrong there.
    """

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(fault)
        self.path: str = path
        self.fault: str = fault


def describe_fault(error: Exception) -> tuple[str, str]:
    """Returns where a value does not fit its type, such as `$.items[2].price`, and what is wrong there.

    msgspec says both in the text of its error, and nowhere else. Within a part that a stand-in represents, the error of
    the stand-in's reader says both.
    """
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return "$", f"it is not valid JSON: {text}"
    found = _MSGSPEC_FAULT.fullmatch(text)
    path, fault = (found["path"].replace("`", ""), found["fault"]) if found else ("$", text)
    if isinstance(cause := error.__cause__, ValueFaultError):
        path, fault = f"{path}{cause.path}", cause.fault
    return path, excerpt(fault[:1].lower() + fault[1:])


def as_value_fault(error: msgspec.ValidationError) -> ValueFaultError:
    """Returns an error of msgspec as one that a reader of stand-ins raises."""
    path, fault = describe_fault(error)
    return ValueFaultError(path.removeprefix("$"), fault)


def describe_alternative(error: msgspec.ValidationError) -> str:
    """Returns why a value does not fit one of several types, in a few words."""
    path, fault = describe_fault(error)
    return fault if path == "$" else f"{path.removeprefix('$').removeprefix('.')}: {fault}"
