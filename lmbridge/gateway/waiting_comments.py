"""Comments for clients whose streams have not begun yet, so that their read timeouts do not run out.

A request may wait for minutes until its model is loaded, and clients give up when nothing arrives for a while. So when
a client has waited for a stream for some seconds, the gateway begins the response with status 200 and sends comments,
which all parsers of event streams skip. From then on, an error can only be reported by an event.
"""

from __future__ import annotations

import asyncio
from typing import Final

from lmbridge._tasks import end_task
from lmbridge.gateway.http_server import IncomingRequest

FIRST_COMMENT_SECONDS: Final = 5.0
"""The seconds after which the first comment is sent, and the seconds between two of them."""
_COMMENT: Final = b": waiting for the model\n\n"
_HEADERS: Final = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),
)


class WaitingComments:
    """Sends comments to a waiting client, until it is stopped.

    Args:
        incoming: The request whose response has not arrived yet.
        seconds: The seconds until the first comment, and between two of them.
    """

    def __init__(self, incoming: IncomingRequest, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._incoming = incoming
        self._seconds = seconds
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._task: asyncio.Task[None] | None = None
        self._timer = loop.call_later(seconds, self._start)

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._send_comments())

    async def stop(self) -> None:
        """Stops the comments. A comment that is being written is completed first, so that it is not split.

        Raises:
            ConnectionError: The client has left.
        """
        self._timer.cancel()
        if not self._stopped.done():
            self._stopped.set_result(None)
        if self._task is not None:
            await self._task

    async def give_up(self) -> None:
        """Stops the comments at once, even in the middle of one, because the client gets no response."""
        self._timer.cancel()
        if self._task is not None:
            await end_task(self._task)

    async def _send_comments(self) -> None:
        await self._incoming.begin(200, _HEADERS)
        while not self._stopped.done():
            await self._incoming.write(_COMMENT)
            await asyncio.wait((self._stopped,), timeout=self._seconds)
