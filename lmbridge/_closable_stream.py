"""`ClosableStream`: the base class of the streams of replies and of agent runs.

What closing does, also from another task, is decided by `ReplyStream` in `client.reply_stream` and `RunStream` in
`agent.runs`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self, TypeVar

from lmbridge._copying import NotCopyable

_Item = TypeVar("_Item")


class ClosableStream(NotCopyable, AsyncGenerator[_Item, None]):
    """The base class of streams: an async generator that takes no values, and is also an async context manager.

    A subclass defines `__anext__` and `aclose`.
    """

    __slots__ = ()

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> _Item: ...

    async def asend(self, value: None) -> _Item:
        """Returns the next item. Only None can be sent, because a stream takes no values."""
        if value is not None:
            raise TypeError(f"a {type(self).__name__} takes no values; iterate it")
        return await self.__anext__()

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> _Item:
        """Closes the stream and raises the exception."""
        await self.aclose()
        error = typ if isinstance(typ, BaseException) else typ() if val is None else val
        raise error.with_traceback(tb) if tb is not None else error

    @abstractmethod
    async def aclose(self) -> None:
        """Closes the stream; may be called from any task, and more than once."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
