"""The time limit of a call, which the server extends by reporting progress.

A call that builds a project or searches a large folder may take minutes. If the limit were long enough for such calls,
a run would also wait for minutes when a server hangs. So the limit applies to the time since the last report of
progress, if the server sends any. A second limit applies to the whole call, as the protocol recommends, because a
server that reports progress for ever must not hold up a run for ever.

While the server waits for the user's answer to a question, the first limit is suspended: the server does nothing that
could hang, and a person needs more time than a tool. The second limit is not suspended.

`ManagedServer` starts the timer when the session is open, so a restart of the server does not count.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

LONGEST_CALL_FACTOR: Final = 10
"""The limit for the whole of a call, as a multiple of the limit that progress extends, unless the configuration sets
another one."""


class CallTimeoutError(TimeoutError):
    """A call has used up its time. The text is a clause about the server, such as "did not answer within 5 seconds"."""


class CallTimer:
    """Waits for one call within its time limits.

    Args:
        limit: The time limit in seconds, which starts again at each report of progress; None for no limit.
        longest: The time limit for the whole call in seconds. Default: ten times `limit`, or no limit if that is None.
    """

    def __init__(self, limit: float | None, longest: float | None = None) -> None:
        self._limit = limit
        self._longest = longest if longest is not None or limit is None else LONGEST_CALL_FACTOR * limit
        self._give_up_at: float | None = None
        self._timeout: asyncio.Timeout | None = None
        self._has_progressed = False
        self._open_questions = 0
        self._error: CallTimeoutError | None = None

    async def wait(self, future: asyncio.Future[Any]) -> None:
        """Waits until the future is done, or the time is up. In the second case, the future is cancelled."""
        if self._longest is not None:
            self._give_up_at = asyncio.get_running_loop().time() + self._longest
        timeout = self._timeout = asyncio.timeout_at(self._deadline())
        try:
            async with timeout:
                await future
        except TimeoutError:
            # The caller now cancels the request that should have completed the future. That may take seconds, in which
            # the other limit may pass as well, so the error is created here.
            self._error = self._error_at(timeout.when())
        finally:
            self._timeout = None

    def extend(self) -> None:
        """Starts the limit again, because the server has reported progress."""
        self._has_progressed = True
        self._reschedule()

    def suspend(self) -> None:
        """Suspends the limit while the server waits for the user. Each use must be followed by one use of `resume`."""
        self._open_questions += 1
        self._reschedule()

    def resume(self) -> None:
        """Starts the limit again, because the user has answered, unless another question is still open."""
        self._open_questions -= 1
        self._reschedule()

    def error(self) -> CallTimeoutError:
        """Returns the error that says which of the limits ended `wait`."""
        return self._error or CallTimeoutError("did not answer before the request was cancelled")

    def _error_at(self, deadline: float | None) -> CallTimeoutError:
        if deadline == self._give_up_at:
            end = ", although it reported progress" if self._has_progressed else ""
            end = ", and was still waiting for the user to answer" if self._open_questions else end
            return CallTimeoutError(f"did not answer within {self._longest:g} seconds{end}")
        if self._has_progressed:
            return CallTimeoutError(f"reported no progress for {self._limit:g} seconds")
        return CallTimeoutError(f"did not answer within {self._limit:g} seconds")

    def _reschedule(self) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(self._deadline())

    def _deadline(self) -> float | None:
        limit = None if self._open_questions else self._limit
        next_report = None if limit is None else asyncio.get_running_loop().time() + limit
        return min((each for each in (next_report, self._give_up_at) if each is not None), default=None)
