"""The order of requests of several clients: each client in turn, however many requests each of them has waiting.

Each request gets a *round* when it arrives: the round after the one that was admitted last, or after that of the
client's last request that is still waiting, whichever is later. Requests are admitted by round, and within a round in
the order of their arrival. So if a client sends a hundred requests at once, only one of them is admitted in each round,
and the first request of another client waits for about one request of each client that came before it. This is
self-clocked fair queueing (S. J. Golestani, 1994) with requests of equal weight.

No client can starve: a request that arrives now belongs to a later round than the current one, so only requests that
were there before, or that arrive before its round is reached, are admitted earlier. The scheduler has a bound on how
long a request waits, in which the earlier requests for its model are counted. Here, these are the requests of earlier
rounds.

Only requests that compete for the same turn are counted together: those of one priority and, if the number of loaded
models is limited, for one model. They are a *group*, and each group has its own current round. With one round for all,
twenty urgent requests would move the round on by twenty while none of the normal requests is admitted, and the next
client would wait for twenty normal requests of a client that came before it.

A group whose requests have all been admitted is forgotten, and begins again at the latest round of all groups. So the
rounds of two groups differ only by what one of them was admitted while requests of the other were waiting. This matters
if the requests of both become comparable, because two models are loaded or a request has waited for so long that its
priority rises: then the group that has waited goes first, until it has caught up.

The alternative was one queue for each client, which the scheduler would visit in turn. But the scheduler already sorts
by model, priority and age, and then by a number that a request may bring along. A round is such a number.
"""

from __future__ import annotations

from typing import Final

import attrs

from lmbridge._scheduled_run import ScheduledRun


@attrs.define(eq=False)
class _Group:
    """The requests that compete for the same turn."""

    round: int
    """The round of the request that was admitted last."""
    waiting: dict[str, dict[int, None]] = attrs.field(factory=dict)
    """The rounds of the waiting requests of each client, the latest last."""


class FairPlace(ScheduledRun):
    """The place of a request in the order of all requests. Its `number` is the round of the request.

    Args:
        number: The round.
        client: The name of the client.
        group: The priority of the request, and its model if models are counted separately.
    """

    __slots__ = ("client", "group")

    def __init__(self, number: int, client: str, group: tuple[int, str | None]) -> None:
        super().__init__(number=number)
        self.client: Final = client
        """The name of the client."""
        self.group: Final = group
        """The priority of the request, and its model if models are counted separately."""


class FairOrder:
    """Gives each request a place in the order of all requests."""

    def __init__(self) -> None:
        # The latest round of all groups.
        self._round = 0
        # The groups that have waiting requests.
        self._groups: dict[tuple[int, str | None], _Group] = {}

    def enter(self, client: str, priority: int, model: str | None = None) -> FairPlace:
        """Returns the place of a request that arrives now.

        When the request is over, the caller must call `ScheduledRun.end` and `leave`, whether it was admitted or not.

        Args:
            client: The name of the client.
            priority: The priority of the request. Only requests of the same priority are ordered by client.
            model: The model of the request if requests for different models wait separately, because the number of
                loaded models is limited. By default the requests for all models are one group.
        """
        key = (priority, model)
        group = self._groups.get(key) or self._groups.setdefault(key, _Group(self._round))
        rounds = group.waiting.setdefault(client, {})
        number = max(group.round, next(reversed(rounds), 0)) + 1
        rounds[number] = None
        return FairPlace(number, client, key)

    def admitted(self, place: FairPlace) -> None:
        """Records that a request was admitted."""
        self._round = max(self._round, place.number)
        if (group := self._groups.get(place.group)) is not None:
            group.round = max(group.round, place.number)
        self.leave(place)

    def leave(self, place: FairPlace) -> None:
        """Records that a request no longer waits. Calling it again does nothing."""
        group = self._groups.get(place.group)
        if group is None or (rounds := group.waiting.get(place.client)) is None:
            return
        rounds.pop(place.number, None)
        if not rounds:
            del group.waiting[place.client]
        if not group.waiting:
            del self._groups[place.group]
