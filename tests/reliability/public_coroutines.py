"""Finds everything public that is asynchronous, so that nothing is forgotten."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

_RETURNED = ("AsyncGenerator", "AsyncIterator", "Awaitable", "Coroutine", "AbstractAsyncContextManager")
_SPECIAL = ("__aenter__", "__anext__")


def is_asynchronous(function: Any) -> bool:
    """Returns whether the result of a call has to be awaited, iterated by `async for`, or entered by `async with`."""
    wrapped = inspect.unwrap(function)
    if any(map(inspect.iscoroutinefunction, (function, wrapped))) or inspect.isasyncgenfunction(wrapped):
        return True
    # It is a text, because all modules of the package postpone the evaluation of annotations.
    returned = getattr(wrapped, "__annotations__", {}).get("return", "")
    return isinstance(returned, str) and returned.startswith(_RETURNED)


def asynchronous_members(owner: type) -> Iterator[str]:
    """Yields the names of the public asynchronous methods of a class, of entering it and of iterating over it."""
    for name, value in inspect.getmembers(owner, callable):
        if (not name.startswith("_") or name in _SPECIAL) and is_asynchronous(value):
            yield name
