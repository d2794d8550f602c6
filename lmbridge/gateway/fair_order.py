"""The order of requests of several clients: each client in turn, however many requests each of them has waiting.

Each request gets a *round* when it arrives: the round after the one that was admitted last, or after that of the
client's last request that is still waiting, whichever is later. Requests are admitted by round, and within a round in
the order of their arrival. So if a client sends a hundred requests at once, only one of them is admitted in each round,
and the first request of another client waits for about one request of each client that came before it. This is
self-clocked fair queueing (S. J. Golestani, 1994) with requests of equal weight.

No client can starve: a request that arrives now belongs to a later round than the current one, so only requests that
were there before, or that arrive before its round is reached, are admitted earlier. A client's waiting requests of
another priority do not delay the round of a request. The scheduler has a bound on how long a request waits, in which
the earlier requests for its model are counted. Here, these are the requests of earlier rounds.

The alternative was one queue for each client, which the scheduler would visit in turn. But the scheduler already sorts
by model, priority and age, and then by a number that a request may bring along. A round is such a number.
"""

from __future__ import annotations

from lmbridge._scheduled_run import ScheduledRun


class FairOrder:
    """Gives each request a place in the order of all requests."""

    def __init__(self) -> None:
        self._round = 0
        # The rounds of the waiting requests of each client and priority, the latest last.
        self._waiting: dict[tuple[str, int], dict[int, None]] = {}

    def enter(self, client: str, priority: int) -> ScheduledRun:
        """Returns the place of a request that arrives now.

        When the request is over, the caller must call `ScheduledRun.end` and `leave`, whether it was admitted or not.

        Args:
            client: The name of the client.
            priority: The priority of the request. Only requests of the same priority are ordered by client.
        """
        rounds = self._waiting.setdefault((client, priority), {})
        number = max(self._round, next(reversed(rounds), 0)) + 1
        rounds[number] = None
        return ScheduledRun(number=number)

    def admitted(self, client: str, priority: int, place: ScheduledRun) -> None:
        """Records that a request was admitted."""
        self._round = max(self._round, place.number)
        self.leave(client, priority, place)

    def leave(self, client: str, priority: int, place: ScheduledRun) -> None:
        """Records that a request no longer waits. Calling it again does nothing."""
        key = (client, priority)
        if (rounds := self._waiting.get(key)) is not None:
            rounds.pop(place.number, None)
            if not rounds:
                del self._waiting[key]
