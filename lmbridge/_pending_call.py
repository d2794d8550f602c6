"""The object that an async method returns, which explains a forgotten `await`.

Python says "'coroutine' object is not subscriptable" about a forgotten `await`. So the methods that people call return
a `PendingCall`, which is a coroutine for everybody who awaits it, and names the missing `await` for everybody else.
Type checkers see an `async def` as before.

Whatever works with a coroutine works with a `PendingCall`. In particular it is true as a condition, because programs
ask `if pending: await pending`, and it does not count as iterable.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, NoReturn, TypeVar, cast

from lmbridge._copying import NotCopyable

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Coroutine[Any, Any, Any]])


class PendingCall(NotCopyable, Coroutine[Any, Any, _T]):
    """A call of a method that has to be awaited. It does nothing until then.

    It works wherever a coroutine does: with `await`, `asyncio.create_task`, `gather`, `wait_for` and task groups.
    """

    _instead_of_a_copy = "call the method again"

    __slots__ = ("__weakref__", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, _T]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        """Continues the coroutine, as the event loop does."""
        return self._coroutine.send(value)

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> Any:
        """Raises an exception in the coroutine."""
        if val is None and tb is None:
            return self._coroutine.throw(typ)
        return self._coroutine.throw(typ, val, tb)

    def close(self) -> None:
        """Closes the coroutine."""
        self._coroutine.close()

    def __repr__(self) -> str:
        return f"<a call of {self._name}() that has not been awaited>"

    @property
    def _name(self) -> str:
        return getattr(self._coroutine, "__name__", "the method")

    def __getattr__(self, name: str) -> Any:
        # asyncio and debuggers read `cr_frame` and similar attributes.
        try:
            return getattr(self._coroutine, name)
        except AttributeError:
            raise AttributeError(f"`await` is missing before {self._name}(...): it has no {name!r} yet") from None

    def _misused(self, example: str) -> NoReturn:
        # Nothing will await the coroutine any more. If it were not closed, Python would warn about that as well.
        self._coroutine.close()
        raise TypeError(f"`await` is missing: write `{example.format(self._name)}`")

    def __getitem__(self, key: object) -> NoReturn:
        # `for` and `in` also end up here: without an `__iter__`, Python asks for the items, beginning with item 0.
        self._misused("await {}(...)" if key == 0 else "(await {}(...))[...]")

    def __aiter__(self) -> NoReturn:
        self._misused("async for ... in await {}(...)")

    async def __aenter__(self) -> NoReturn:
        self._misused("async with await {}(...) as ...")

    async def __aexit__(self, *exc_info: object) -> None:
        """Is never called, because entering fails. But `with` statements require that it exists."""

    def __enter__(self) -> NoReturn:
        self._misused("async with await {}(...) as ...")

    def __exit__(self, *exc_info: object) -> None:
        """Is never called, because entering fails. But `with` statements require that it exists."""


def explains_missing_await(function: _Function) -> _Function:
    """Makes an async method return a `PendingCall`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> PendingCall[Any]:
        return PendingCall(function(*args, **kwargs))

    # This makes `iscoroutinefunction` return True, by which `unittest.mock` and others recognize an async function.
    if (mark := getattr(inspect, "markcoroutinefunction", None)) is not None:
        mark(call)
    else:
        call._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # noqa: SLF001 - before 3.12
    return cast("_Function", call)
