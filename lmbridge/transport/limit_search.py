"""Asks a server how many requests and models it can handle at the same time, once the answer begins to matter.

The limits of a server decide what happens when requests meet: how many of them go at the same time, and for how many
models. They do not matter for a request that is alone. So by default the server is asked as soon as a second request
would be in flight at the same time, and a program that sends one request after the other never asks. The alternative
was to ask before the first request in any case. It would cost a script that sends a single request another round trip,
and it would surprise everybody who counts the requests that a server gets. A user who passes `limits="auto"` wants
the server to be asked, so with that option it is asked before the first request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import attrs

from lmbridge._tasks import SingleFlight
from lmbridge.config import Limits
from lmbridge.transport.admission import Admission

if TYPE_CHECKING:
    from lmbridge.transport.transport import Transport

SEARCH_PATIENCE: Final = 2.0
"""The most seconds that requests wait for the limits of a server, unless the user has passed `limits="auto"`."""


@attrs.frozen(kw_only=True)
class LimitFinder:
    """How a transport finds out the limits of its server."""

    find: Callable[[Transport], Awaitable[Limits]]
    """Asks the server. If it raises an `LLMError`, the limits stay as they are."""
    until_known: Limits = attrs.field(factory=Limits)
    """The limits that are in force as long as the server has not answered."""
    only_when_needed: bool = False
    """Whether the server is asked only when a second request would be in flight at the same time. Then requests wait
    for the answer for no longer than `SEARCH_PATIENCE`, and a missing answer is not worth a warning."""


class LimitSearch:
    """Asks one server for its limits, while its transport is open.

    Args:
        finder: How and when to ask.
        admission: The requests that are in flight or wait.
    """

    def __init__(self, finder: LimitFinder, admission: Admission) -> None:
        self.is_over: bool = False
        """Whether the server has been asked, and nothing has happened since that may have changed the answer."""
        self._finder = finder
        self._admission = admission
        self._loop = asyncio.get_running_loop()
        # On cancellation of all requests, the question goes on: the next request benefits from the answer.
        self._question: SingleFlight[None] = SingleFlight(
            "the client was closed while it asked for the server's limits", keep_going=True
        )
        self._arriving = 0
        self._has_waited = False
        self._patient_until: float | None = None

    def forget(self, *, was_stale: bool = False) -> None:
        """Records that another server may be running by now, so it has to be asked again.

        Args:
            was_stale: Whether only a kept connection turned out to be dead. That shows little, because some servers
                close each connection after an answer. So in this case the server is asked again only with
                `limits="auto"`.
        """
        if was_stale and self._finder.only_when_needed:
            return
        self.is_over = False
        self._patient_until = None

    async def wait(self, ask: Callable[[LimitFinder], Awaitable[bool]]) -> None:
        """Waits until the limits are known, if they matter for a request that has just arrived.

        Args:
            ask: Asks the server, puts the limits in force, and returns whether the answer is final. It raises nothing.
        """
        if not self._finder.only_when_needed:
            await self._question.run("limits", partial(self._search, ask))
            return
        self._arriving += 1
        try:
            if not self._has_waited:
                self._has_waited = True
                # After one step of the event loop, all requests that were started together with this one have arrived.
                await asyncio.sleep(0)
            # The client may have been closed in the meantime, and a question would open it again.
            if not self.is_over and (self._arriving > 1 or self._admission.in_flight or self._admission.queued):
                await self._wait_briefly(ask)
        finally:
            self._arriving -= 1

    async def ask_now(self, ask: Callable[[LimitFinder], Awaitable[bool]]) -> None:
        """Asks the server unless it has been asked, even if the limits do not matter for any request yet.

        Args:
            ask: As in `wait`.
        """
        if not self.is_over:
            await self._question.run("limits", partial(self._search, ask))

    async def _wait_briefly(self, ask: Callable[[LimitFinder], Awaitable[bool]]) -> None:
        now = self._loop.time()
        if self._patient_until is None:
            self._patient_until = now + SEARCH_PATIENCE
        if now < self._patient_until:
            try:
                async with asyncio.timeout_at(self._patient_until):
                    await self._question.run("limits", partial(self._search, ask))
            except TimeoutError:
                # The answer is put in force when it arrives.
                return

    async def _search(self, ask: Callable[[LimitFinder], Awaitable[bool]]) -> None:
        self.is_over = await ask(self._finder)

    async def close(self) -> None:
        """Cancels a question in progress, and waits until it has ended. The server is not asked again after that."""
        self.is_over = True
        await self._question.cancel_all()


def as_finder(limits: Any) -> LimitFinder | None:
    """Returns the option `limits` of a transport as a `LimitFinder`, or None if it is a `Limits` or was not passed."""
    if isinstance(limits, LimitFinder):
        return limits
    return LimitFinder(find=cast("Callable[[Transport], Awaitable[Limits]]", limits)) if callable(limits) else None
