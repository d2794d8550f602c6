"""Keeps a session open after the host has closed its end of the pipe, until the host's requests have been answered.

The SDK cancels everything that is in progress once there are no more messages. That is right when the host has ended,
but not in `lmbridge-mcp < requests.jsonl`, where the input ends long before the answers are ready. So the SDK learns of
the end of the input only when each request has been answered, or when nobody can read the answers any longer.

The wait is limited, because a host that wants this process to end closes stdin and may then wait for the exit. Requests
that are still open at the limit are answered with an error, so that no request is left without an answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any, Final

import msgspec

from lmbridge.mcp.bridge.host_link import HostLink
from lmbridge.mcp.jsonrpc import INTERNAL_ERROR

_HOST_CHECK_SECONDS: Final = 0.1
"""How often the wait for answers checks whether the host still reads, in seconds."""
_LAST_ERRORS_SECONDS: Final = 1.0
"""How long the host may take to read the errors of the requests that are still open at the limit, in seconds."""
_UNANSWERED_METHODS: Final = frozenset({"subscriptions/listen"})
"""The requests that stay open as long as the session does, so their answers are not waited for."""


class _ReplyHead(msgspec.Struct):
    """The part of a message to the host that says which request it answers."""

    id: Any = None
    method: str | None = None


class PatientLink:
    """A link to the host whose input ends only when the requests before the end have been answered.

    Args:
        link: The connection to the host.
        patience: How many seconds to wait at most for the answers after the end of the input.
    """

    def __init__(self, link: HostLink, patience: float) -> None:
        self._link, self._patience = link, patience
        self._open_requests: Counter[Hashable] = Counter()
        # The number of answers that have been handed to the link but are not written yet.
        self._unwritten = 0
        self._all_answered = asyncio.Event()
        self._has_given_up = False

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message, or None once there will be no more and the requests so far have been answered."""
        message = await self._link.receive()
        if message is None:
            await self._wait_for_answers()
        elif message.get("method") == "notifications/cancelled":
            # SDK 2.x does not answer a request that has been cancelled.
            params = message.get("params")
            self._forget_request(params.get("requestId") if isinstance(params, Mapping) else None)
        elif _is_request(message):
            self._open_requests[message["id"]] += 1
        return message

    async def send(self, message: bytes) -> None:
        """Sends a message. A request that was given up is not answered a second time.

        Raises:
            ConnectionError: The host no longer reads.
        """
        reply = msgspec.json.decode(message, type=_ReplyHead)
        answered = None if reply.method is not None else reply.id
        if answered is None:
            await self._link.send(message)
            return
        if self._has_given_up:
            return
        # From now on the answer will be written, however long that takes, so the request must not get an error as well.
        self._unwritten += 1
        self._forget_request(answered)
        try:
            await self._link.send(message)
        finally:
            self._unwritten -= 1
            self._note_progress()

    def _forget_request(self, request_id: Any) -> None:
        if isinstance(request_id, str | int) and request_id in self._open_requests:
            self._open_requests[request_id] -= 1
            # Counter's unary plus drops the counts that are zero.
            self._open_requests = +self._open_requests
        self._note_progress()

    def _note_progress(self) -> None:
        if not self._open_requests and not self._unwritten:
            self._all_answered.set()

    async def _wait_for_answers(self) -> None:
        if self._open_requests or self._unwritten:
            self._all_answered.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    await self._wait_until_answered_or_unread()
        self._has_given_up = True
        # The host may have stopped reading without closing its end of the pipe.
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_LAST_ERRORS_SECONDS):
                await self._answer_with_errors()

    async def _answer_with_errors(self) -> None:
        for request_id in self._open_requests.elements():
            text = (
                f"stdin was closed, and the request did not end within {self._patience:g} seconds after that, so it "
                "was cancelled; keep stdin open, or start lmbridge-mcp with a larger --eof-timeout"
            )
            error = {"code": INTERNAL_ERROR, "message": text}
            await self._link.send(msgspec.json.encode({"jsonrpc": "2.0", "id": request_id, "error": error}))

    async def _wait_until_answered_or_unread(self) -> None:
        while self._link.can_host_read:
            with suppress(TimeoutError):
                async with asyncio.timeout(_HOST_CHECK_SECONDS):
                    await self._all_answered.wait()
                    return


def _is_request(message: Mapping[str, Any]) -> bool:
    """Returns whether a message is a request whose answer is waited for."""
    return (
        isinstance(message.get("method"), str)
        and message["method"] not in _UNANSWERED_METHODS
        and isinstance(message.get("id"), str | int)
        and not isinstance(message["id"], bool)
    )
