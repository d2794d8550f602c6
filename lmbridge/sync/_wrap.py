"""The base classes of `lmbridge.sync`: each of its objects wraps an object of the asynchronous library.

A method of a blocking class runs the method of the same name in the background loop. If that returns an object with
asynchronous methods, the object is wrapped in turn: a stream becomes an iterator, and the handle of a run becomes a
handle whose `result()` blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from lmbridge._copying import NotCopyable
from lmbridge.sync._portal import portal

_Item_co = TypeVar("_Item_co", covariant=True)
_END_OF_STREAM: Final = object()
"""The value that `Stream._next_item` returns at the end."""

_blocking_classes: Final[dict[str, type[Wrapper]]] = {}
"""The blocking class for each asynchronous class. The keys are names, so that no unused module has to be imported."""


class Wrapper(NotCopyable):
    """A blocking object around an asynchronous one.

    Attributes:
        wrapped: The asynchronous object. It belongs to the background loop and must not be used in any other loop.
    """

    _instead_of_a_copy = "pass the object itself on, and create another one in each process"

    wraps: ClassVar[str] = ""
    """The module and the name of the asynchronous class, for example "lmbridge.client.llm:LLMClient"."""

    wrapped: Any

    def __init_subclass__(cls) -> None:
        if "wraps" in cls.__dict__:
            _blocking_classes[cls.wraps] = cls

    @classmethod
    def around(cls, wrapped: Any) -> Self:
        """Returns a blocking object that wraps an existing asynchronous one."""
        self = cls.__new__(cls)
        self.wrapped = wrapped
        return self

    def __repr__(self) -> str:
        return f"<sync {self.wrapped!r}>"

    def _set_wrapped(self, wrapped: Any) -> None:
        """Stores the asynchronous object that a constructor has made, for which no event loop is needed."""
        self.wrapped = wrapped

    @staticmethod
    def _await(make_coroutine: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Runs a coroutine in the background loop, and wraps its result."""
        return wrap(portal.run(make_coroutine))

    def _call(self, function: Callable[[], Any]) -> Any:
        """Calls a plain function in the thread of the background loop, and wraps its result."""
        return wrap(portal.call(function))


class Owner(Wrapper):
    """A blocking object that owns connections.

    Close it, or use it as a context manager. An object that is dropped, or is still open when the interpreter exits, is
    closed as well.
    """

    _is_closed = False

    def _set_wrapped(self, wrapped: Any) -> None:
        super()._set_wrapped(wrapped)
        portal.close_at_exit(wrapped)

    def __enter__(self) -> Self:
        portal.run(self.wrapped.__aenter__)
        self._is_closed = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections. Calls in progress in other threads end with `TaskCancelledError`.

        It can be called more than once.
        """
        portal.run(self.wrapped.close)
        self._is_closed = True

    def __del__(self) -> None:
        if not self._is_closed and hasattr(self, "wrapped"):
            portal.close_soon(self.wrapped.close)


class Stream(Wrapper, Iterator[_Item_co], Generic[_Item_co]):
    """A blocking iterator over an asynchronous stream.

    Iterate it once, in one thread at a time. It is also a context manager. Leaving it early ends the stream, so that
    the server stops generating; `close()`, the end of its `with` block and dropping it all do that.
    """

    _is_finished = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _Item_co:
        item = portal.run(self._next_item)
        if item is _END_OF_STREAM:
            self._is_finished = True
            raise StopIteration
        return item  # type: ignore[no-any-return]  # the wrapped stream is untyped

    async def _next_item(self) -> Any:
        # A StopAsyncIteration cannot cross a future, and a coroutine cannot raise StopIteration.
        try:
            return await anext(self.wrapped)
        except StopAsyncIteration:
            return _END_OF_STREAM

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def collect(self) -> Any:
        """Reads the stream to its end, and returns the dict that the plain call would have returned.

        Raises:
            LLMError: The stream failed; `.partial` is what had arrived.
        """
        from lmbridge.client.collecting import collect  # noqa: PLC0415 - streams of runs never need it

        reply = portal.run(lambda: collect(self.wrapped))
        self._is_finished = True
        return reply

    def close(self) -> None:
        """Closes the stream. Any thread may call it, more than once."""
        self._is_finished = True
        portal.run(self.wrapped.aclose)

    def __del__(self) -> None:
        if self._is_finished or not hasattr(self, "wrapped"):
            return
        # The connection of the stream may only be closed in the thread of the loop.
        portal.close_soon(self.wrapped.aclose)


class _GeneratorStream(Stream[Any]):
    """A blocking iterator over a plain async generator."""


@contextlib.contextmanager
def entered(make: Callable[[], Any]) -> Iterator[Any]:
    """Enters an asynchronous context manager in the background loop, and leaves it at the end of a `with` block."""
    manager = portal.call(make)
    value = wrap(portal.run(manager.__aenter__))
    try:
        yield value
    except BaseException as exc:
        # As in an asynchronous `async with`, the manager sees any exception of the block and may suppress it.
        error, trace = exc, exc.__traceback__
        if not portal.run(lambda: manager.__aexit__(type(error), error, trace)):
            raise
    else:
        portal.run(lambda: manager.__aexit__(None, None, None))


def wrap(value: Any) -> Any:
    """Returns a blocking object for a stream, handle or other asynchronous object, and any other value unchanged."""
    for kind in type(value).__mro__:
        if (blocking := _blocking_classes.get(f"{kind.__module__}:{kind.__qualname__}")) is not None:
            return blocking.around(value)
    return _GeneratorStream.around(value) if isinstance(value, AsyncIterator) else value


def unwrap(value: Any) -> Any:
    """Returns the asynchronous object inside of a blocking one, and any other value unchanged."""
    return value.wrapped if isinstance(value, Wrapper) else value
