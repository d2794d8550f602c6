"""Decides which runs may be in flight together when their models differ.

========  =================================  ==============================================
policy    a run with another model           a switch of the agent's model
========  =================================  ==============================================
isolate   runs beside the others             cancels the runs that took the agent's model
reject    is refused                         is refused while runs are in flight
cancel    cancels the others, then runs      the same
drain     runs when the others have ended    the same
========  =================================  ==============================================

A run's model is fixed when it is admitted, and never changes afterwards. The alternative, one model for the whole agent
that a switch changes under its runs, would let the second half of a conversation be written by another model.

`Switchboard` makes the decisions and does nothing else: it creates no task and never waits, so every rule can be tested
without an event loop. `RunAdmission` applies the decisions to tasks, which wait until they are admitted. A lock for
each model would be shorter, but it could neither cancel the runs that block another one nor keep the order of arrival.

Runs and switches that have to wait share one queue. A run that was started by a tool of a run in flight must not wait
for that run, which is itself waiting for the tool. So the new run skips the queue, or is refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final, Literal

import attrs

from lmbridge.errors import ModelChangedDuringExecutionError, TaskCancelledError

SwitchPolicy = Literal["isolate", "reject", "cancel", "drain"]
"""What happens when a run with another model is started while runs are in flight; see the table of this module."""

_REJECTED_HINT: Final = (
    "wait until it has ended, or choose another switch_policy: 'isolate' runs both, 'drain' waits,"
    " 'cancel' cancels the first"
)
_NESTED_HINT: Final = "runs that a tool starts need the model of the run that called it, or a separate agent"
_CANCELLED_HINT: Final = (
    "choose the switch_policy 'drain' to let runs end first, or 'isolate' to run models side by side"
)


@attrs.define(eq=False, kw_only=True)
class RunPermit:
    """A run, or a switch of the agent's model, from its arrival to its end."""

    requested_model: str | None
    """The model that the run or the switch names, or None for the agent's model."""
    is_switch: bool = False
    """True for a switch of the agent's model, False for a run."""
    parent: RunPermit | None = None
    """The permit of the run whose tool started this run or switch, even if that run belongs to another agent; None if
    no tool started it."""
    cancel: Callable[[TaskCancelledError], object] = lambda _error: None
    """Called with an error to cancel the run. It does not wait for the end of the run."""
    model: str | None = None
    """The model of a run, fixed when it is admitted."""
    cancelled_by: RunPermit | None = None
    """The run or the switch that caused this run to be cancelled; None if it was not cancelled."""

    def ancestors(self) -> Iterator[RunPermit]:
        """Yields the run whose tool started this one, the run that started that one, and so on."""
        permit = self.parent
        while permit is not None:
            yield permit
            permit = permit.parent


@attrs.define
class Effects:
    """The runs and switches that an arrival or a departure affects."""

    admitted: list[RunPermit] = attrs.field(factory=list)
    """Runs and switches that may go ahead now, in the order of their arrival."""
    cancelled: list[tuple[RunPermit, ModelChangedDuringExecutionError]] = attrs.field(factory=list)
    """Runs that have to be cancelled, and the error that each of them raises."""


class Switchboard:
    """Decides which runs may be in flight. It neither creates tasks nor waits.

    Args:
        policy: What a run with another model does to the runs in flight.
        default: The agent's model, or None if the server chooses it.

    Attributes:
        default: The agent's model, which a switch changes.
    """

    def __init__(self, policy: SwitchPolicy, default: str | None) -> None:
        self.default = default
        self._policy = policy
        self._running: dict[RunPermit, None] = {}
        self._queue: dict[RunPermit, None] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no run is in flight and nothing waits."""
        return not self._running and not self._queue

    def arrive(self, permit: RunPermit) -> Effects:
        """Admits a run or a switch now, or puts it into the queue, to be admitted after a later arrival or departure.

        Raises:
            ModelChangedDuringExecutionError: The run or the switch is refused.
        """
        effects = Effects()
        self._raise_if_refused(permit)
        if self._skips_queue(permit):
            self._admit(permit, effects)
        else:
            self._queue[permit] = None
            self._advance(effects)
        return effects

    def leave(self, permit: RunPermit) -> Effects:
        """Removes a run or a switch that has ended, or that no longer waits."""
        effects = Effects()
        self._running.pop(permit, None)
        self._queue.pop(permit, None)
        self._advance(effects)
        return effects

    # Decisions

    def _wanted_model(self, permit: RunPermit) -> str | None:
        return self.default if permit.requested_model is None else permit.requested_model

    def _raise_if_refused(self, permit: RunPermit) -> None:
        blockers = self._blockers(permit)
        if self._policy == "reject":
            is_change = permit.is_switch and permit.requested_model != self.default
            for run in self._running if is_change else blockers:
                raise self._refusal(run, permit, "is in flight", _REJECTED_HINT)
        for ancestor in filter(self._running.__contains__, permit.ancestors()):
            if ancestor in blockers:
                raise self._refusal(ancestor, permit, "is in flight, and one of its tools asked for this", _NESTED_HINT)
            if ancestor.cancelled_by is not None and (self._policy == "cancel" or permit.requested_model is None):
                # The new run is part of its ancestor, so it gets the same error.
                raise self._cancellation(ancestor, ancestor.cancelled_by)

    def _skips_queue(self, permit: RunPermit) -> bool:
        if self._policy == "isolate":
            return not permit.is_switch and (permit.requested_model is not None or not self._queue)
        return any(ancestor in self._running for ancestor in permit.ancestors())

    def _blockers(self, permit: RunPermit) -> list[RunPermit]:
        """Returns the runs in flight that have to end before the permit is admitted."""
        if permit.requested_model == self.default if permit.is_switch else self._policy == "isolate":
            return []
        wanted = self._wanted_model(permit)
        runs = (run for run in self._running if run.model != wanted)
        return [run for run in runs if self._policy != "isolate" or run.requested_model is None]

    def _advance(self, effects: Effects) -> None:
        while self._queue:
            first = next(iter(self._queue))
            blockers = self._blockers(first)
            if blockers:
                self._cancel(blockers, first, effects)
                return
            del self._queue[first]
            self._admit(first, effects)

    def _admit(self, permit: RunPermit, effects: Effects) -> None:
        if permit.is_switch:
            self.default = permit.requested_model
        else:
            permit.model = self._wanted_model(permit)
            self._running[permit] = None
        effects.admitted.append(permit)

    def _cancel(self, runs: list[RunPermit], by: RunPermit, effects: Effects) -> None:
        if self._policy == "drain":
            return
        for run in runs:
            if run.cancelled_by is None:
                run.cancelled_by = by
                effects.cancelled.append((run, self._cancellation(run, by)))

    def _cancellation(self, run: RunPermit, by: RunPermit) -> ModelChangedDuringExecutionError:
        new = self._wanted_model(by)
        message = f"the run with model {run.model!r} was cancelled by {_describe_permit(by)} {new!r}"
        return ModelChangedDuringExecutionError(message, run.model, new, hint=_CANCELLED_HINT)

    def _refusal(self, run: RunPermit, permit: RunPermit, why: str, hint: str) -> ModelChangedDuringExecutionError:
        new = self._wanted_model(permit)
        message = f"{_describe_permit(permit)} {new!r} was refused: a run with model {run.model!r} {why}"
        return ModelChangedDuringExecutionError(message, run.model, new, hint=hint)


def _describe_permit(permit: RunPermit) -> str:
    return "a switch of the agent's model to" if permit.is_switch else "a run with model"


class RunAdmission:
    """Makes runs and switches wait until a `Switchboard` admits them.

    Args:
        policy: See `Switchboard`.
        default: See `Switchboard`.
    """

    def __init__(self, policy: SwitchPolicy, default: str | None) -> None:
        self._board = Switchboard(policy, default)
        self._waiting: dict[RunPermit, asyncio.Future[None]] = {}

    @property
    def default(self) -> str | None:
        """The agent's model, or None if the server chooses it."""
        return self._board.default

    @property
    def is_idle(self) -> bool:
        """Whether no run is in flight and nothing waits."""
        return self._board.is_idle

    async def enter(self, permit: RunPermit) -> None:
        """Waits until the permit is admitted. A run that was admitted must `leave`.

        On cancellation, the permit leaves the queue. Runs that it has caused to be cancelled stay cancelled.

        Raises:
            ModelChangedDuringExecutionError: The run or the switch is refused.
        """
        effects = self._board.arrive(permit)
        self._apply(effects)
        if permit in effects.admitted:
            return
        admitted = self._waiting[permit] = asyncio.get_running_loop().create_future()
        try:
            await admitted
        except BaseException:
            # The permit may have been admitted at the same moment, and would then block others forever.
            self.leave(permit)
            raise
        finally:
            self._waiting.pop(permit, None)

    def leave(self, permit: RunPermit) -> None:
        """Ends the run or the wait of a permit, and admits the runs and switches that were waiting for that."""
        self._apply(self._board.leave(permit))

    def _apply(self, effects: Effects) -> None:
        for permit in effects.admitted:
            future = self._waiting.get(permit)
            if future is not None and not future.done():
                future.set_result(None)
        for permit, error in effects.cancelled:
            permit.cancel(error)
