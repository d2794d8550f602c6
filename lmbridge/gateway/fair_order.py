"""The order of requests of several clients: each client in turn, however many requests each of them has waiting.

Each request gets a number, its *round*, when it arrives. The round is one more than the current round, which is the
round of the request that was admitted last. But if requests of the same client are waiting, the new request comes at
least one round after the last of them. Requests are admitted by round, and within a round in the order of their
arrival. So if a client sends a hundred requests at once, only one of them is admitted in each round, and the first
request of another client waits for about one request of each client that came before it. This is self-clocked fair
queueing (S. J. Golestani, 1994) with requests of equal weight.

No client can starve. A request that arrives now belongs to a later round than the current one. So only requests that
were there before, or that arrive before its round is reached, are admitted earlier. The scheduler bounds how long a
request waits, and this bound includes the earlier requests for the same model. In a gateway, the earlier requests are
those of earlier rounds.

Rounds are counted separately for each *group* of requests that compete for the same turn: requests of the same priority
and, if the number of loaded models is limited, for the same model. If all requests had the same rounds, twenty urgent
requests would advance the round by twenty while no normal request is admitted. The next client would then have to wait
for twenty normal requests of a client that came before it.

A group is forgotten once all of its requests have been admitted. If it is needed again, it begins at the latest round
of all groups. So the rounds of two groups can differ only because requests of one group were admitted while requests of
the other were waiting. This matters when the requests of both groups become comparable, because two models are loaded,
or because a request has waited for so long that its priority rises. Then the group that has waited goes first, until it
has caught up.

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
    """The rounds of the waiting requests of each client, in ascending order."""


class FairPosition(ScheduledRun):
    """The position of a request in the order of all requests. Its `number` is the round of the request.

    Args:
        number: The round.
        client: The name of the client.
        group: The priority of the request, and its model if models are counted separately.
    """

    __slots__ = ("client", "group", "is_waiting")

    def __init__(self, number: int, client: str, group: tuple[int, str | None]) -> None:
        super().__init__(number=number)
        self.client: Final = client
        """The name of the client."""
        self.group: Final = group
        """The priority of the request, and its model if models are counted separately."""
        self.is_waiting: bool = True
        """Whether the request still waits for its turn."""


class FairOrder:
    """Gives each request a position in the order of all requests."""

    def __init__(self) -> None:
        # The latest round of all groups.
        self._round = 0
        # The groups that have waiting requests.
        self._groups: dict[tuple[int, str | None], _Group] = {}

    def enter(self, client: str, priority: int, model: str | None = None) -> FairPosition:
        """Returns the position of a request that arrives now.

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
        return FairPosition(number, client, key)

    def admitted(self, position: FairPosition) -> None:
        """Records that a request was admitted."""
        self._round = max(self._round, position.number)
        if (group := self._groups.get(position.group)) is not None:
            group.round = max(group.round, position.number)
        self.leave(position)

    def leave(self, position: FairPosition) -> None:
        """Records that a request no longer waits. Calling it again does nothing."""
        if not position.is_waiting:
            # A later request of the client may have the same round, because its group was forgotten in between.
            return
        position.is_waiting = False
        group = self._groups[position.group]
        rounds = group.waiting[position.client]
        del rounds[position.number]
        if not rounds:
            del group.waiting[position.client]
        if not group.waiting:
            del self._groups[position.group]
