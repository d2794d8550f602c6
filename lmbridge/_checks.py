"""Checks of arguments, shared by every constructor and function that takes options.

Each check takes the name of an argument and its value, returns the value if it can be used, and otherwise raises an
`LLMValidationError` such as "max_retries must be an integer of at least 0, not -1". A constructor calls a check
directly; an attrs class wraps it with `as_validator`::

    self._size = check_integer("pool_size", pool_size)
    max_rounds: int = attrs.field(default=25, validator=as_validator(check_integer))

Plain functions won over attrs' own validators because those raise `TypeError` and `ValueError` with texts that are
written for the author of the class, and over a validation library because a dozen comparisons do not need one.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol, TypeGuard, TypeVar

from lmbridge._text import shorten
from lmbridge.errors import LLMValidationError

_T = TypeVar("_T")

_SHOWN_CHARACTERS: Final = 100
"""Characters of a refused value that the error repeats."""


def invalid_argument(name: str, expected: str, value: object, hint: str | None = None) -> LLMValidationError:
    """Returns the error for an argument that cannot be used: "`name` must be `expected`, not `value`".

    Most arguments that are checked here are options, so without a `hint` the error suggests to leave the argument out.
    """
    shown = shorten(repr(value), _SHOWN_CHARACTERS)
    return LLMValidationError(f"{name} must be {expected}, not {shown}", hint=hint or _default_hint(name))


def wrong_type(name: str, expected: str, value: object, hint: str) -> LLMValidationError:
    """Returns the error for an argument of the wrong type: "`name` must be `expected`, not `type`".

    It is for arguments that hold content, such as messages: the error does not repeat the value, which may be long.
    """
    kind = "None" if value is None else type(value).__name__
    return LLMValidationError(f"{name} must be {expected}, not {kind}", hint=hint)


def is_integer(value: object) -> TypeGuard[int]:
    """Returns whether a value is an integer; True and False are not, although Python counts them as integers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Returns whether a value is an integer or a float, but not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_integer(
    name: str,
    value: _T,
    *,
    minimum: int = 1,
    maximum: int | None = None,
    optional: bool = False,
    also: str | None = None,
    hint: str | None = None,
) -> _T:
    """Accepts an integer within bounds.

    Args:
        name: The argument's name, as the caller knows it.
        value: The argument.
        minimum: The smallest integer that is accepted.
        maximum: The largest integer that is accepted. Default: no bound.
        optional: Whether None is accepted as well.
        also: One word that is accepted as well, such as "auto".
        hint: What to do about it. Default: to leave the argument out.

    Raises:
        LLMValidationError: The value is something else.
    """
    if optional and value is None:
        return value
    if also is not None and isinstance(value, str) and value == also:
        return value
    number: Any = value
    if not is_integer(number) or number < minimum or (maximum is not None and number > maximum):
        bounds = f"from {minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"
        others = [repr(also)] if also is not None else []
        raise invalid_argument(name, " or ".join([f"an integer {bounds}", *others, *_none(optional)]), value, hint)
    return value


def check_seconds(name: str, value: _T, *, optional: bool = True, hint: str | None = None) -> _T:
    """Accepts a finite, positive number of seconds, and None unless `optional` is False.

    Raises:
        LLMValidationError: The value is something else.
    """
    if optional and value is None:
        return value
    number: Any = value
    if not is_number(number) or not 0 < number < math.inf:
        raise invalid_argument(name, " or ".join(["a positive number of seconds", *_none(optional)]), value, hint)
    return value


def check_text(name: str, value: _T, *, optional: bool = False, secret: bool = False, hint: str | None = None) -> _T:
    """Accepts a string that is not blank, and None if `optional` is set.

    A value that may be a `secret` is left out of the error.

    Raises:
        LLMValidationError: The value is something else.
    """
    if optional and value is None:
        return value
    if isinstance(value, str) and value.strip():
        return value
    expected = " or ".join(["a string that is not blank", *_none(optional)])
    if secret:
        raise LLMValidationError(f"{name} must be {expected}", hint=hint or _default_hint(name))
    raise invalid_argument(name, expected, value, hint)


def check_choice(name: str, value: _T, choices: Collection[str], *, hint: str | None = None) -> _T:
    """Accepts one of a few words.

    Raises:
        LLMValidationError: The value is something else.
    """
    if not isinstance(value, str) or value not in choices:
        raise invalid_argument(name, _one_of(choices), value, hint)
    return value


def check_bool(name: str, value: Any, *, hint: str | None = None) -> bool:
    """Accepts True or False, and nothing that Python merely counts as one of them.

    Raises:
        LLMValidationError: The value is something else.
    """
    if not isinstance(value, bool):
        raise invalid_argument(name, "True or False", value, hint)
    return value


def check_callable(name: str, value: _T, *, optional: bool = False, sync: bool = False, hint: str | None = None) -> _T:
    """Accepts something that can be called, and None if `optional` is set.

    Args:
        name: The argument's name, as the caller knows it.
        value: The argument.
        optional: Whether None is accepted as well.
        sync: Whether an async function is refused, because nothing would await its result.
        hint: What to do about it. Default: to leave the argument out.

    Raises:
        LLMValidationError: The value is something else.
    """
    if optional and value is None:
        return value
    if not callable(value) or (sync and inspect.iscoroutinefunction(value)):
        kind = "a plain (not async) function" if sync else "a function"
        raise invalid_argument(name, " or ".join([kind, *_none(optional)]), value, hint)
    return value


def check_instance(name: str, value: _T, kind: type, *, optional: bool = False, hint: str | None = None) -> _T:
    """Accepts an instance of a class, and None if `optional` is set.

    Raises:
        LLMValidationError: The value is something else.
    """
    if (optional and value is None) or isinstance(value, kind):
        return value
    raise invalid_argument(name, " or ".join([f"an instance of {kind.__name__}", *_none(optional)]), value, hint)


def check_path(name: str, value: _T, *, optional: bool = False, hint: str | None = None) -> _T:
    """Accepts a path that is not empty, as a string or a `Path`, and None if `optional` is set.

    Raises:
        LLMValidationError: The value is something else.
    """
    if optional and value is None:
        return value
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise invalid_argument(name, " or ".join(["the path of a file", *_none(optional)]), value, hint)
    return value


def check_model_name(model: str | None, *, name: str = "model") -> str | None:
    """Accepts the name of a model, and None for the client's default or the server's choice.

    Raises:
        LLMValidationError: The value is blank, or not a string.
    """
    if model is None or (isinstance(model, str) and model.strip()):
        return model
    raise invalid_argument(name, "the name of a model or None", model, "list_models() returns the names that exist")


class _Attribute(Protocol):
    @property
    def name(self) -> str: ...


def as_validator(
    check: Callable[..., Any], *, owner: str = "", **options: Any
) -> Callable[[Any, _Attribute, Any], None]:
    """Returns a check as a validator of an attrs field.

    Args:
        check: One of the checks of this module.
        owner: The class whose name stands before that of the field in errors, where the field's name alone would not
            say what is meant: with "Timeouts", an error reads "Timeouts.idle must be ...".
        **options: Keyword arguments of the check.
    """

    def validate(_instance: Any, attribute: _Attribute, value: Any) -> None:
        check(f"{owner}.{attribute.name}" if owner else attribute.name, value, **options)

    return validate


def _default_hint(name: str) -> str:
    return f"leave {name} out to use its default"


def _none(optional: bool) -> list[str]:
    return ["None"] if optional else []


def _one_of(choices: Collection[str]) -> str:
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last
