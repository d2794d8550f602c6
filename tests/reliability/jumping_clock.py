"""An event loop whose clock jumps to the next timer when there is nothing else to do.

The client, the proxy and the server of a case are in one process, and the kernel delivers between them at once. So when
no socket is ready, nothing will happen before the next timer, and a wait of seconds takes none. That also makes time
limits exact: on a busy machine they do not run out before the bytes that they wait for have arrived.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any, Final

_REAL_WAIT: Final = 0.5
"""The seconds that a socket gets to become ready after all, before the clock jumps. A busy kernel delivers late."""


class _JumpingSelector(selectors.BaseSelector):
    """A selector that does not wait: it counts the seconds that it should have waited."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.skipped = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._selector.select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            return self._selector.select(None)
        wait = min(timeout, _REAL_WAIT)
        ready = self._selector.select(wait)
        if not ready:
            self.skipped += timeout - wait
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.modify(fileobj, events, data)

    def close(self) -> None:
        self._selector.close()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop with such a clock."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return super().time() + self._jumping.skipped
