"""Which run may disturb which, when their models differ.

`Switchboard` decides, and does nothing else: no task and no wait. `Admission` is the same for tasks, which wait until
they are let in.

========  =================================  ==============================================
policy    a run with another model           a switch of the agent's model
========  =================================  ==============================================
isolate   runs beside the others             cancels the runs that took the agent's model
reject    is refused                         is refused while there are runs
cancel    cancels the others, then runs      the same
drain     runs when the others have ended    the same
========  =================================  ==============================================

Who has to wait stands in one queue. A run that was started by a tool of a run in flight must not wait for that one,
which waits for its tool: it is let in past the queue, or refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Literal

import attrs

from lmbridge.errors import ModelChangedDuringExecutionError, TaskCancelledError

SwitchPolicy = Literal["isolate", "reject", "cancel", "drain"]


@attrs.define(eq=False, kw_only=True)
class Ticket:
    """A run, or a switch of the agent's model, from its arrival to its end."""

    asked: str | None
    """The model that it names; a run that names none takes the agent's."""
    is_switch: bool = False
    parent: Ticket | None = None
    """The run whose tool started it, of whichever agent."""
    cancel: Callable[[TaskCancelledError], object] = lambda _error: None
    model: str | None = None
    """Of a run: fixed when it is admitted."""
    doomed_by: Ticket | None = None
    """Who had it cancelled."""

    def ancestors(self) -> Iterator[Ticket]:
        """The run that started it, the one that started that, and so on."""
        ticket = self.parent
        while ticket is not None:
            yield ticket
            ticket = ticket.parent


@attrs.define
class Effects:
    """What follows from an arrival or an end."""

    admitted: list[Ticket] = attrs.field(factory=list)
    doomed: list[tuple[Ticket, ModelChangedDuringExecutionError]] = attrs.field(factory=list)


class Switchboard:
    """Decides who runs.

    Args:
        policy: What a run with another model does to those in flight.
        default: The agent's model; None where the choice is the server's.

    Attributes:
        default: As given, until it is switched.
    """

    def __init__(self, policy: SwitchPolicy, default: str | None) -> None:
        self.default = default
        self._policy = policy
        self._running: dict[Ticket, None] = {}
        self._queue: dict[Ticket, None] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nobody."""
        return not self._running and not self._queue

    def arrive(self, ticket: Ticket) -> Effects:
        """Takes somebody in: it is admitted now, or has to wait until a later effect admits it.

        Raises:
            ModelChangedDuringExecutionError: it is refused.
        """
        effects = Effects()
        self._refuse(ticket)
        if self._passes_the_queue(ticket):
            self._admit(ticket, effects)
        else:
            self._queue[ticket] = None
            self._advance(effects)
        return effects

    def leave(self, ticket: Ticket) -> Effects:
        """Lets somebody go, who may have been admitted or not."""
        effects = Effects()
        self._running.pop(ticket, None)
        self._queue.pop(ticket, None)
        self._advance(effects)
        return effects

    # Decisions

    def _wanted(self, ticket: Ticket) -> str | None:
        return self.default if ticket.asked is None else ticket.asked

    def _refuse(self, ticket: Ticket) -> None:
        in_the_way = self._in_the_way(ticket)
        if self._policy == "reject":
            is_change = ticket.is_switch and ticket.asked != self.default
            for run in self._running if is_change else in_the_way:
                raise self._refusal(run, ticket, "is in flight", _REJECTED)
        for ancestor in filter(self._running.__contains__, ticket.ancestors()):
            if ancestor in in_the_way:
                raise self._refusal(ancestor, ticket, "is in flight, and started it by a tool", _NESTED)
            if ancestor.doomed_by is not None and (self._policy == "cancel" or ticket.asked is None):
                raise self._cancellation(ancestor, ancestor.doomed_by)  # as it was told itself: this is part of it

    def _passes_the_queue(self, ticket: Ticket) -> bool:
        if self._policy == "isolate":
            return not ticket.is_switch and (ticket.asked is not None or not self._queue)
        return any(ancestor in self._running for ancestor in ticket.ancestors())

    def _in_the_way(self, ticket: Ticket) -> list[Ticket]:
        """The runs in flight that have to end before it is admitted."""
        if ticket.asked == self.default if ticket.is_switch else self._policy == "isolate":
            return []
        wanted = self._wanted(ticket)
        runs = (run for run in self._running if run.model != wanted)
        return [run for run in runs if self._policy != "isolate" or run.asked is None]

    def _advance(self, effects: Effects) -> None:
        while self._queue:
            first = next(iter(self._queue))
            blockers = self._in_the_way(first)
            if blockers:
                self._doom(blockers, first, effects)
                return
            del self._queue[first]
            self._admit(first, effects)

    def _admit(self, ticket: Ticket, effects: Effects) -> None:
        if ticket.is_switch:
            self.default = ticket.asked
        else:
            ticket.model = self._wanted(ticket)
            self._running[ticket] = None
        effects.admitted.append(ticket)

    def _doom(self, runs: list[Ticket], by: Ticket, effects: Effects) -> None:
        if self._policy == "drain":
            return
        for run in runs:
            if run.doomed_by is None:
                run.doomed_by = by
                effects.doomed.append((run, self._cancellation(run, by)))

    def _cancellation(self, run: Ticket, by: Ticket) -> ModelChangedDuringExecutionError:
        new = self._wanted(by)
        message = f"the run with model {run.model!r} was cancelled by {_described(by)} {new!r}"
        return ModelChangedDuringExecutionError(message, run.model, new, hint=_CANCELLED)

    def _refusal(self, run: Ticket, ticket: Ticket, why: str, hint: str) -> ModelChangedDuringExecutionError:
        new = self._wanted(ticket)
        message = f"{_described(ticket)} {new!r} was refused: a run with model {run.model!r} {why}"
        return ModelChangedDuringExecutionError(message, run.model, new, hint=hint)


def _described(ticket: Ticket) -> str:
    return "a switch of the agent's model to" if ticket.is_switch else "a run with model"


_REJECTED = (
    "wait until it has ended, or choose another switch_policy: 'isolate' runs both, 'drain' waits,"
    " 'cancel' cancels the first"
)
_NESTED = "a tool's own runs need the model of the run that called it, or an agent of their own"
_CANCELLED = "choose the switch_policy 'drain' to let runs end first, or 'isolate' to run models side by side"


class Admission:
    """Lets runs and switches in as the switchboard decides.

    Args:
        policy: As for `Switchboard`.
        default: As for `Switchboard`.
    """

    def __init__(self, policy: SwitchPolicy, default: str | None) -> None:
        self._board = Switchboard(policy, default)
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}

    @property
    def default(self) -> str | None:
        """The agent's model."""
        return self._board.default

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return self._board.is_idle

    async def enter(self, ticket: Ticket) -> None:
        """Waits until it is let in; whoever is must `leave`. Cancelled while it waits, it was never here.

        Raises:
            ModelChangedDuringExecutionError: it is refused.
        """
        effects = self._board.arrive(ticket)
        self._apply(effects)
        if ticket in effects.admitted:
            return
        admitted = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            await admitted
        except BaseException:
            self.leave(ticket)  # it may have been let in meanwhile
            raise
        finally:
            self._waiting.pop(ticket, None)

    def leave(self, ticket: Ticket) -> None:
        """Makes way for those who wait."""
        self._apply(self._board.leave(ticket))

    def _apply(self, effects: Effects) -> None:
        for ticket in effects.admitted:
            future = self._waiting.get(ticket)
            if future is not None and not future.done():
                future.set_result(None)
        for ticket, error in effects.doomed:
            ticket.cancel(error)
