"""`TurnRunner`: makes the calls of one reply, and answers each of them.

Identical calls of one reply are made only once. Small models repeat a call many times in a reply, above all when a
server's grammar lets them, and making it many times would at best waste time and at worst order nine pizzas. Each of
the identical calls still gets its own result, because servers refuse a conversation in which a call has no result.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, NamedTuple

import attrs
import msgspec

from lmbridge._tasks import ITEMS_PER_STEP, list_in_slices, pause_after, run_together
from lmbridge.agent.approval import Approval
from lmbridge.agent.channel import Channel
from lmbridge.agent.events import RunEvent, ToolCallFinished, ToolCallStarted
from lmbridge.agent.guards import BadCallGuard, RepetitionGuard
from lmbridge.agent.history import Turn, resendable_call
from lmbridge.agent.journal_interface import UNCERTAIN_RESULT, RecordedResult, RunJournal
from lmbridge.agent.model_reply import ModelReply, WireCall
from lmbridge.agent.pause import PauseGate
from lmbridge.agent.planned_calls import PlannedCall, encode_sorted, to_tool_call, unite_identical
from lmbridge.agent.result import StopReason, ToolRecord
from lmbridge.agent.resumed_calls import replay_decisions
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.sampling import forbids_calls, request_fields
from lmbridge.agent.settings import Settings
from lmbridge.agent.tool_execution import ToolOutcome
from lmbridge.agent.tools import ToolCall, ToolContext
from lmbridge.agent.toolset import InvalidCall, ReadyCall, Toolset
from lmbridge.observe.watches import RunWatch

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_FORBIDDEN: Final = "Not called: this run does not allow calls of tools (tool_choice is 'none'). Answer in text."


class _CallKind(NamedTuple):
    """The properties of a call by which its reply is judged. Most calls of a reply are of the same kind."""

    is_repaired: bool
    """Whether the call had small mistakes that have been repaired."""
    is_invalid: bool
    """Whether the call cannot be made."""
    wrong_tool: str | None
    """The tool, by its name in requests, if it exists and only the arguments of the call are wrong; otherwise None."""


_VALID_KIND: Final = _CallKind(is_repaired=False, is_invalid=False, wrong_tool=None)
"""The kind of a valid call that needed no repair, as nearly all calls are."""


class TurnRunner:
    """Makes the calls of the replies of one run.

    Args:
        run_id: The id of the run, which its tools receive.
        settings: The options of the run.
        toolset: The tools of the run.
        record: Everything that the run has done; calls and results are written to it.
        channel: Carries the events of the run.
        is_stopping: Returns True if the run has been cancelled. Tools in threads poll it, because threads cannot be
            cancelled.
        gate: Holds the run before each call while the run is paused.
        clock: Returns the seconds since the run first asked its model.
        journal: Keeps the steps of the run, and replays those from before an interruption. None if the run has none.

    Attributes:
        wrong_tool: The tool, by its name in requests, if all calls of the last reply were calls of this one tool with
            wrong arguments; otherwise None.
        has_results: Whether a tool has returned something so far, without an error.
    """

    def __init__(
        self,
        run_id: str,
        *,
        settings: Settings,
        toolset: Toolset,
        record: RunRecord,
        channel: Channel[RunEvent],
        is_stopping: Callable[[], bool],
        gate: PauseGate,
        clock: Callable[[], float],
        journal: RunJournal | None = None,
    ) -> None:
        self._gate = gate
        self._clock = clock
        self._journal = journal
        self._run_id = run_id
        self._settings = settings
        self._toolset = toolset
        self._record = record
        self._channel = channel
        self._is_stopping = is_stopping
        in_parallel = request_fields(settings.sampling).get("parallel_tool_calls") is not False
        self._most_at_once = settings.max_parallel_tools if in_parallel else 1
        self._approval = Approval(settings.approve, toolset, record)
        self._repetition = RepetitionGuard(settings.repetition_limit)
        self._bad_calls = BadCallGuard(settings.max_bad_calls)
        self.wrong_tool: str | None = None
        self.has_results: bool = False
        # The calls whose results are in the conversation and are not errors.
        self._answered: set[tuple[str, bytes]] = set()
        # The calls of the last reply, with their records.
        self._last_calls: Sequence[WireCall] = ()
        self._last_records: Sequence[ToolRecord] = ()

    @property
    def stop_reason(self) -> StopReason | None:
        """The reason why the run has to end after the calls so far, or None if it may go on."""
        return "bad_calls" if self._bad_calls.tripped else "repetition" if self._repetition.tripped else None

    def has_result_of(self, name: str, arguments: Any) -> bool:
        """Returns whether the conversation has a result of such a call that is not an error."""
        return (name, encode_sorted(arguments)) in self._answered

    def forgive_repetitions(self) -> None:
        """Allows each call once more, because the model may have lost its result when the context was compacted."""
        self._repetition.forgive()
        self._answered.clear()
        self._last_calls = self._last_records = ()

    async def repeats_last_calls(self, calls: Sequence[WireCall]) -> bool:
        """Returns whether each of these calls was also made, without an error, for the last reply that had calls."""
        pairs = zip(self._last_calls, self._last_records, strict=True)
        known = await list_in_slices(_key_of(call) for call, record in pairs if not record.is_error)
        return bool(known) and set(await list_in_slices(map(_key_of, calls))) <= set(known)

    async def run(self, reply: ModelReply) -> list[ToolRecord]:
        """Makes the calls of a reply concurrently, and returns their records in the order of the calls."""
        # There may be thousands of calls, so each step works through them in slices. If the run is cancelled between
        # two slices, its history has either none of the calls, or all of them, with a result or a placeholder for each.
        turn = await self._begin_turn(reply, reply.calls)
        read = await self._read(reply)
        kinds = set(await list_in_slices(map(_kind_of, read)))
        if any(kind.is_repaired for kind in kinds):
            turn = await self._begin_turn(reply, map(_as_meant, reply.calls, read))
        calls = await list_in_slices(map(to_tool_call, read))
        self._record.calls += calls
        planned = await self._plan(read)
        await self._decide(planned)
        records = await self._answer_all(planned, calls, turn, is_constrained=reply.constrained_to is not None)
        await pause_after(turn.size)
        self._record.history.end_turn()
        await pause_after(turn.size)
        self._last_calls, self._last_records = reply.calls, records
        self._repetition.end_reply()
        self._bad_calls.note(bad=all(kind.is_invalid for kind in kinds))
        wrong_tools = {kind.wrong_tool for kind in kinds}
        self.wrong_tool = wrong_tools.pop() if len(wrong_tools) == 1 else None
        return records

    async def _read(self, reply: ModelReply) -> Sequence[ReadyCall | InvalidCall]:
        """Reads the calls of a reply. If the run does not allow calls, each of them becomes an `InvalidCall`."""
        if not forbids_calls(self._settings.sampling):
            repairs, may_be_cut = self._settings.repair_calls, reply.may_have_cut_call
            return await self._toolset.read_all(reply.calls, repairs=repairs, may_be_cut=may_be_cut)
        return await list_in_slices(
            InvalidCall(each["id"], each["function"]["name"], _FORBIDDEN) for each in reply.calls
        )

    async def _begin_turn(self, reply: ModelReply, calls: Iterable[WireCall]) -> Turn:
        sent_calls = await list_in_slices(resendable_call(self._as_sent(each)) for each in calls)
        turn = self._record.history.begin_turn(reply.text, sent_calls, reasoning=reply.reasoning_fields)
        await pause_after(turn.size)
        return turn

    def _as_sent(self, call: WireCall) -> WireCall:
        """Returns a call in which the tool has its name in requests, even if the model used another name for it."""
        function = call["function"]
        name = self._toolset.find_request_name(function["name"])
        return call if name in (None, function["name"]) else {**call, "function": {**function, "name": name}}

    async def _plan(self, read: Sequence[ReadyCall | InvalidCall]) -> list[PlannedCall]:
        """Returns the calls to make or to refuse. Identical calls become one, unless `deduplicate_calls` is False."""
        if len(read) == 1:
            return [PlannedCall(read[0], [0])]
        if not self._settings.deduplicate_calls:
            return await list_in_slices(PlannedCall(each, [place]) for place, each in enumerate(read))
        return list(dict.fromkeys(await list_in_slices(unite_identical(read))))

    async def _decide(self, planned: Sequence[PlannedCall]) -> None:
        """Decides which calls are made, or replays the decisions from before an interruption."""
        if self._journal is None:
            if self._settings.approve is not None:
                await self._approval.decide(planned)
        elif recorded := self._journal.calls_of_reply():
            await replay_decisions(planned, recorded, self._approval)
        else:
            await self._approval.decide(planned)
            await self._journal.plan(await list_in_slices(map(PlannedCall.for_journal, planned)))

    async def _answer_all(
        self, planned: Sequence[PlannedCall], calls: Sequence[ToolCall], turn: Turn, *, is_constrained: bool
    ) -> list[ToolRecord]:
        records: dict[int, ToolRecord] = {}
        waiting = iter(planned)

        async def answer_waiting() -> None:
            for each in waiting:
                record = await self._record_of(each, calls, turn)
                if is_constrained:
                    record = attrs.evolve(record, constrained=True)
                for place in each.places:
                    is_first = place == each.places[0]
                    records[place] = (
                        record if is_first else attrs.evolve(record, call=calls[place], seconds=0.0, is_duplicate=True)
                    )
                    turn.answer(calls[place].id, record.text, record.images if is_first else ())
                    if self._channel.has_listener:
                        await self._channel.put(ToolCallFinished(records[place]))
                    if len(records) % ITEMS_PER_STEP == 0:
                        await asyncio.sleep(0)

        # A single call, as in most replies, does not need a separate task. The tasks share one iterator, so that
        # thousands of calls do not need thousands of tasks.
        if len(planned) == 1:
            await answer_waiting()
        else:
            # If one of the tasks raises an exception, such as the error of a journal that could not be written, the
            # others are cancelled.
            await run_together(answer_waiting() for _ in range(min(len(planned), self._most_at_once)))
        # There may be thousands of records, so they are not collected by a loop in Python.
        return list(map(records.__getitem__, range(len(calls))))

    async def _record_of(self, planned: PlannedCall, calls: Sequence[ToolCall], turn: Turn) -> ToolRecord:
        read = planned.read
        if isinstance(read, InvalidCall):
            return planned.refused(read.text) if planned.recorded is None else planned.made_before(planned.recorded)
        return self._with_repetition_warning(await self._make(planned, read, calls, turn))

    async def _make(self, planned: PlannedCall, read: ReadyCall, calls: Sequence[ToolCall], turn: Turn) -> ToolRecord:
        """Returns the record of a call, which is made unless its result is known or the call is not allowed."""
        if planned.recorded is not None:
            if read.call.tool is self._toolset.finder:
                # The search is repeated, so that the tools that it had found are offered again.
                await self._toolset.call(read, self._context_of(read.call), timeout=None, max_output=1)
            return planned.made_before(planned.recorded)
        if planned.refusal is not None:
            return planned.refused(planned.refusal)
        if planned.is_uncertain:
            record = planned.refused(UNCERTAIN_RESULT)
        else:
            record = await self._make_call(planned, read, calls, turn)
        if self._journal is not None:
            await self._journal.finish(planned.places[0], RecordedResult.of(record))
        return record

    async def _make_call(
        self, planned: PlannedCall, read: ReadyCall, calls: Sequence[ToolCall], turn: Turn
    ) -> ToolRecord:
        if self._gate.is_closed:
            await self._gate.wait()
        if read.call.repaired:
            logger.info("a call of %r had small mistakes, and was repaired", read.call.name)
        turn.begin([calls[place].id for place in planned.places])
        if self._journal is not None:
            await self._journal.start(planned.places[0])
        if planned.edited is None:
            return await self._call_tool(read)
        made = planned.edited.call
        record = await self._call_tool(planned.edited)
        # Without this note, the model would take the result for that of the call that it has requested.
        note = f"[The user changed this call: {made.name}({encode_sorted(made.arguments).decode()}) was made.]"
        text = f"{note}\n{record.text}"
        return attrs.evolve(record, call=read.call, repaired=read.call.repaired, edited=made, text=text)

    def _context_of(self, call: ToolCall) -> ToolContext:
        return ToolContext(self._run_id, call.id, call.name, self._is_stopping, self._settings.tool_timeout)

    async def _call_tool(self, ready: ReadyCall) -> ToolRecord:
        call, settings = ready.call, self._settings
        if self._channel.has_listener:
            await self._channel.put(ToolCallStarted(call))
        started = self._clock()
        run = self._toolset.call(
            ready, self._context_of(call), timeout=settings.tool_timeout, max_output=settings.max_tool_output
        )
        outcome = await (run if (watch := self._record.watch) is None else _observe(run, call, watch))
        return ToolRecord(
            call=call,
            text=outcome.text,
            is_error=outcome.is_error,
            raw=outcome.raw,
            images=outcome.images,
            seconds=outcome.seconds,
            started=started,
            repaired=call.repaired,
        )

    def _with_repetition_warning(self, record: ToolRecord) -> ToolRecord:
        if not record.is_error:
            self.has_results = True
            self._answered.add((record.call.name, encode_sorted(record.call.arguments)))
        text = self._repetition.note(record.call.name, record.call.arguments, record.text, record.images)
        if text is record.text:
            return record
        return attrs.evolve(record, text=text)


def _kind_of(read: ReadyCall | InvalidCall) -> _CallKind:
    if isinstance(read, InvalidCall):
        return _CallKind(is_repaired=False, is_invalid=True, wrong_tool=read.tool)
    return _CallKind(is_repaired=True, is_invalid=False, wrong_tool=None) if read.call.repaired else _VALID_KIND


def _key_of(call: WireCall) -> tuple[str, bytes]:
    """Returns a value that is the same for calls of the same tool with equal arguments."""
    arguments = call["function"]["arguments"]
    with contextlib.suppress(ValueError, RecursionError):
        arguments = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    return call["function"]["name"], encode_sorted(arguments)


def _as_meant(call: WireCall, read: ReadyCall | InvalidCall) -> WireCall:
    """Returns a repaired call as the model should have written it, and any other call unchanged."""
    if not isinstance(read, ReadyCall) or not read.call.repaired:
        return call
    function = {**call["function"], "name": read.call.name}
    return {**call, "function": function if read.written is None else {**function, "arguments": read.written}}


async def _observe(run: Coroutine[Any, Any, ToolOutcome], call: ToolCall, watch: RunWatch) -> ToolOutcome:
    """Awaits the call of a tool, and notifies the observers of its beginning and its end."""
    watch.call_begun(call.id, call.name, call.arguments or {})
    try:
        outcome = await run
    except BaseException:
        watch.call_ended(call.id, call.name, "cancelled")
        raise
    watch.call_ended(call.id, call.name, "error" if outcome.is_error else "result", outcome.text)
    return outcome
