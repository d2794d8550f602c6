"""`QueueTimes`: how long the requests of each round of a run waited in the queue of the client."""

from __future__ import annotations

from collections import defaultdict

from lmbridge.observe.events import ObservedEvent, RequestAdmitted, RequestEnded, RequestQueued, RoundBegun


class QueueTimes:
    """Adds up, for each round of one run, the seconds for which its requests waited for their permits.

    It has to be an observer of the client, which reports the requests, and of the agent, which reports the rounds. The
    events of the run itself cannot be used: they arrive late if the terminal is slow, when the next round may already
    have begun.
    """

    def __init__(self) -> None:
        self._round = 0
        self._round_of_request: dict[int, int] = {}
        self._seconds: defaultdict[int, float] = defaultdict(float)

    def on_event(self, event: ObservedEvent) -> None:
        """Counts the wait that an event of the client or of the agent reports."""
        match event:
            case RoundBegun():
                self._round = event.number
            case RequestQueued() if event.run_id is not None:
                self._round_of_request[event.request_id] = self._round
            case RequestAdmitted() if event.request_id in self._round_of_request:
                self._seconds[self._round_of_request[event.request_id]] += event.waited
            case RequestEnded():
                self._round_of_request.pop(event.request_id, None)
            case _:
                pass

    def seconds(self, number: int) -> float:
        """Returns how long the requests of a round have waited, in seconds.

        Args:
            number: The number of the round; the first one is 1.
        """
        return self._seconds.get(number, 0.0)
