"""Checks of arguments, shared by every constructor and function that takes options.

Each check takes the name of an argument and its value, returns the value if it can be used, and otherwise raises an
`LLMValidationError` such as "max_retries must be an integer of at least 0, not -1". A constructor calls a check
directly; an attrs class wraps it with `as_validator`::

    self._size = check_integer("pool_size", pool_size)
    max_rounds: int = attrs.field(default=25, validator=as_validator(check_integer))

There were two alternatives. One was to use the validators of attrs, but they raise `TypeError` and `ValueError`, with
texts that are written for the author of the class. The other one was a validation library, which is too much for a
dozen comparisons.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol, TypeGuard, TypeVar

from lmbridge._text import shorten
from lmbridge.errors import LLMValidationError, ModelNotFoundError

_T = TypeVar("_T")

MAPPING_TYPES: Final = (dict, Mapping)
"""For `isinstance` in code that runs for every request. The concrete class comes first, because checks against abstract
classes are slow."""
_SHOWN_CHARACTERS: Final = 100
"""The number of characters of an invalid value that the error quotes."""


def invalid_argument(name: str, expected: str, value: object, hint: str | None = None) -> LLMValidationError:
    """Returns the error for an argument that cannot be used: "`name` must be `expected`, not `value`".

    Most arguments that are checked here are options. So unless there is a `hint`, the error suggests leaving the
    argument out.
    """
    shown = shorten(repr(value), _SHOWN_CHARACTERS)
    return LLMValidationError(f"{name} must be {expected}, not {shown}", hint=hint or _default_hint(name))


def is_usage_error(error: BaseException) -> bool:
    """Returns whether an error means that the arguments of a program make no sense, so that nothing was sent.

    After such an error, a program exits with status 2. The class of the error alone does not decide, because an
    `LLMValidationError` is also raised when a server refuses a request (then the error has a status), or does not have
    the model.
    """
    is_missing_model = isinstance(error, ModelNotFoundError)
    return isinstance(error, LLMValidationError) and error.status is None and not is_missing_model


def wrong_type(name: str, expected: str, value: object, hint: str) -> LLMValidationError:
    """Returns the error for an argument of the wrong type: "`name` must be `expected`, not `type`".

    Use it for arguments that hold content, such as messages: the error does not quote the value, which may be long.
    """
    type_name = "None" if value is None else type(value).__name__
    return LLMValidationError(f"{name} must be {expected}, not {type_name}", hint=hint)


def hint_for(value: object, hints: Mapping[str, str], default: str | None = None) -> str | None:
    """Returns the hint for an argument that was passed in the wrong place, chosen by its class or a base class.

    Args:
        value: The argument.
        hints: The hints, by the names of the classes. Names are used so that this module need not import the classes.
        default: The hint for a value of any other class.
    """
    if isinstance(value, type):
        return f"create an object of the class first: {value.__name__}(...)"
    if is_blocking(value):
        return f"pass an lmbridge.{type(value).__name__}; those of lmbridge.sync fit only the classes of lmbridge.sync"
    return next((hints[kind.__name__] for kind in type(value).__mro__ if kind.__name__ in hints), default)


def is_blocking(value: object) -> bool:
    """Returns whether a value is an object of `lmbridge.sync`, whose classes have the same names as the async ones."""
    return type(value).__module__.startswith("lmbridge.sync.")


def is_integer(value: object) -> TypeGuard[int]:
    """Returns whether a value is an integer. True and False do not count, although bool is a subclass of int."""
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
    keyword: str | None = None,
    hint: str | None = None,
) -> _T:
    """Returns the value if it is an integer within bounds.

    Args:
        name: The argument's name, as the user knows it.
        value: The argument.
        minimum: The smallest integer that is accepted.
        maximum: The largest integer that is accepted. The default, None, means no limit.
        optional: Whether None is accepted as well.
        keyword: A string that is accepted as well, such as "auto".
        hint: The hint of the error. By default it suggests leaving the argument out.

    Raises:
        LLMValidationError: The value is not one of those.
    """
    if optional and value is None:
        return value
    if keyword is not None and isinstance(value, str) and value == keyword:
        return value
    number: Any = value
    if not is_integer(number) or number < minimum or (maximum is not None and number > maximum):
        bounds = f"from {minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"
        alternatives = [repr(keyword)] if keyword is not None else []
        expected = " or ".join([f"an integer {bounds}", *alternatives, *_none_if(optional)])
        raise invalid_argument(name, expected, value, hint)
    return value


def check_seconds(name: str, value: _T, *, optional: bool = True, hint: str | None = None) -> _T:
    """Returns the value if it is a finite, positive number of seconds, or None unless `optional` is False.

    Raises:
        LLMValidationError: The value is neither.
    """
    if optional and value is None:
        return value
    number: Any = value
    if not is_number(number) or not 0 < number < math.inf:
        raise invalid_argument(name, " or ".join(["a positive number of seconds", *_none_if(optional)]), value, hint)
    return value


def check_text(name: str, value: _T, *, optional: bool = False, secret: bool = False, hint: str | None = None) -> _T:
    """Returns the value if it is a string that is not blank, or None with `optional`.

    Set `secret` if the value may be a secret, such as a key; then the error does not quote it.

    Raises:
        LLMValidationError: The value is neither.
    """
    if optional and value is None:
        return value
    if isinstance(value, str) and value.strip():
        return value
    expected = " or ".join(["a string that is not blank", *_none_if(optional)])
    if secret:
        raise LLMValidationError(f"{name} must be {expected}", hint=hint or _default_hint(name))
    raise invalid_argument(name, expected, value, hint)


def check_choice(name: str, value: _T, choices: Collection[str], *, hint: str | None = None) -> _T:
    """Returns the value if it is one of the given strings.

    Raises:
        LLMValidationError: The value is not one of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise invalid_argument(name, _one_of(choices), value, hint)
    return value


def check_bool(name: str, value: Any, *, hint: str | None = None) -> bool:
    """Returns the value if it is True or False. Other values that are true or false in a condition are refused.

    Raises:
        LLMValidationError: The value is neither.
    """
    if not isinstance(value, bool):
        raise invalid_argument(name, "True or False", value, hint)
    return value


def check_callable(name: str, value: _T, *, optional: bool = False, sync: bool = False, hint: str | None = None) -> _T:
    """Returns the value if it can be called, or None with `optional`.

    Args:
        name: The argument's name, as the user knows it.
        value: The argument.
        optional: Whether None is accepted as well.
        sync: Whether an async function is refused, because nothing would await its result.
        hint: The hint of the error. By default it suggests leaving the argument out.

    Raises:
        LLMValidationError: The value is neither.
    """
    if optional and value is None:
        return value
    if not callable(value) or (sync and inspect.iscoroutinefunction(value)):
        kind = "a plain (not async) function" if sync else "a function"
        raise invalid_argument(name, " or ".join([kind, *_none_if(optional)]), value, hint)
    return value


def check_instance(name: str, value: _T, kind: type, *, optional: bool = False, hint: str | None = None) -> _T:
    """Returns the value if it is an instance of a class, or None with `optional`.

    Raises:
        LLMValidationError: The value is neither.
    """
    if (optional and value is None) or isinstance(value, kind):
        return value
    raise invalid_argument(name, " or ".join([f"an instance of {kind.__name__}", *_none_if(optional)]), value, hint)


def check_path(name: str, value: _T, *, optional: bool = False, hint: str | None = None) -> _T:
    """Returns the value if it is a path that is not empty, as a string or a `Path`, or None with `optional`.

    Raises:
        LLMValidationError: The value is neither.
    """
    if optional and value is None:
        return value
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise invalid_argument(name, " or ".join(["the path of a file", *_none_if(optional)]), value, hint)
    return value


def check_model_name(model: str | None, *, name: str = "model") -> str | None:
    """Returns the name if it can name a model. None is accepted as well: the client or the server then chooses.

    Raises:
        LLMValidationError: The name is blank or not a string.
    """
    if model is None or (isinstance(model, str) and model.strip()):
        return model
    hint = hint_for(model, _MISPLACED_IN_MODEL, "list_models() returns the names that exist")
    raise invalid_argument(name, "the name of a model or None", model, hint)


_MISPLACED_IN_MODEL: Final = {
    "Timeouts": "pass it as timeout=",
    "float": "pass a number of seconds as timeout=",
    "int": "pass a number of seconds as timeout=",
    "Limits": "pass it as limits=",
    "Transport": "pass it as transport=",
    "list": "pass one name; a list of messages or tools has its own keyword",
}


class _Attribute(Protocol):
    """The part of `attrs.Attribute` that a validator uses."""

    @property
    def name(self) -> str: ...


def as_validator(
    check: Callable[..., Any], *, owner: str = "", **options: Any
) -> Callable[[Any, _Attribute, Any], None]:
    """Returns a check as a validator of an attrs field.

    Args:
        check: One of the checks of this module.
        owner: The name of the class, which errors put before the name of the field if the latter alone would not be
            clear: with "Timeouts", an error reads "Timeouts.idle must be ...".
        **options: Keyword arguments for the check.
    """

    def validate(_instance: Any, attribute: _Attribute, value: Any) -> None:
        check(f"{owner}.{attribute.name}" if owner else attribute.name, value, **options)

    return validate


def _default_hint(name: str) -> str:
    return f"leave {name} out to use its default"


def _none_if(optional: bool) -> list[str]:
    return ["None"] if optional else []


def _one_of(choices: Collection[str]) -> str:
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last
