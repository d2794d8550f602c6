"""`TurnRunner`: makes the calls of one reply, and answers each of them.

Identical calls of one reply are made once. Small models repeat a call many times in a reply, above all when a server's
grammar lets them, and making it many times would at best waste time and at worst order nine pizzas. They are still
answered one by one, because servers refuse a conversation in which a call has no result.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import attrs
import msgspec

from lmbridge._tasks import MANY, let_others_run
from lmbridge.agent.channel import Channel
from lmbridge.agent.events import RunEvent, ToolCallFinished, ToolCallStarted
from lmbridge.agent.guards import BadCallGuard, RepetitionGuard
from lmbridge.agent.history import Turn
from lmbridge.agent.pause import PauseGate
from lmbridge.agent.record import RunRecord
from lmbridge.agent.reply import ModelReply, WireCall
from lmbridge.agent.result import StopReason, ToolRecord
from lmbridge.agent.sampling import forbids_calls
from lmbridge.agent.settings import Approve, Settings
from lmbridge.agent.tools import ToolCall, ToolContext
from lmbridge.agent.toolset import InvalidCall, ReadyCall, Toolset
from lmbridge.errors import LLMError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_REFUSAL: Final = "Refused: this call is not allowed. Do something else, or say why you need it."
_APPROVE_HINT: Final = (
    "approve must return True or False, a text that tells the model why not, or the ToolCall to make instead;"
    " the call was not made"
)

_FORBIDDEN: Final = "Not called: this run does not allow calls of tools (tool_choice is 'none'). Answer in text."

_encode_sorted: Final = msgspec.json.Encoder(order="sorted").encode


@attrs.define
class _PlannedCall:
    """A call to make or to refuse, with all calls of the reply that its result answers."""

    read: ReadyCall | InvalidCall
    """The call as it was read."""
    places: list[int]
    """The places of this call and of its duplicates among the calls of the reply."""
    refusal: str | None = None
    """What the model is told if the user does not allow the call; None if the call is allowed."""
    edited: ReadyCall | None = None
    """The call that the user wants in its place, or None."""


class TurnRunner:
    """Makes the calls of the replies of one run.

    Args:
        run_id: The id of the run, for its tools.
        settings: The options of the run.
        toolset: The tools of the run.
        record: Everything that the run has done; calls and results are written to it.
        channel: Carries the events of the run.
        is_stopping: Returns True if the run has been cancelled. Tools in threads poll it, because threads cannot be
            cancelled.
        gate: Holds the run before each call while the run is paused.
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
    ) -> None:
        self._gate = gate
        self._run_id = run_id
        self._settings = settings
        self._toolset = toolset
        self._record = record
        self._channel = channel
        self._is_stopping = is_stopping
        in_parallel = settings.sampling.get("parallel_tool_calls") is not False
        self._most_at_once = settings.max_parallel_tools if in_parallel else 1
        self._repetition = RepetitionGuard(settings.repetition_limit)
        self._bad_calls = BadCallGuard(settings.max_bad_calls)

    @property
    def stop_reason(self) -> StopReason | None:
        """The reason why the run has to end after the calls so far, or None if it may go on."""
        return "bad_calls" if self._bad_calls.tripped else "repetition" if self._repetition.tripped else None

    async def run(self, reply: ModelReply) -> list[ToolRecord]:
        """Makes the calls of a reply concurrently, and returns their records in the order of the calls."""
        # Each step takes milliseconds for a thousand calls. If the run is cancelled between them, its history is valid.
        await let_others_run(reply.calls)
        turn = self._begin_turn(reply, reply.calls)
        await let_others_run(reply.calls)
        read = await self._read(reply)
        if any(isinstance(each, ReadyCall) and each.call.repaired for each in read):
            turn = self._begin_turn(reply, list(map(_as_meant, reply.calls, read)))
        calls = [_to_tool_call(each) for each in read]
        self._record.calls += calls
        await let_others_run(calls)
        planned = self._plan(read)
        await let_others_run(calls)
        await self._ask_for_approval(planned)
        records = await self._answer_all(planned, calls, turn)
        await let_others_run(calls)
        self._record.history.end_turn()
        await let_others_run(calls)
        self._repetition.end_reply()
        self._bad_calls.note(bad=all(isinstance(each, InvalidCall) for each in read))
        return records

    async def _read(self, reply: ModelReply) -> Sequence[ReadyCall | InvalidCall]:
        """Reads the calls of a reply. If the run does not allow calls, none of them can be made."""
        if not forbids_calls(self._settings.sampling):
            repairs, may_be_cut = self._settings.repair_calls, reply.may_have_cut_call
            return await self._toolset.read_all(reply.calls, repairs=repairs, may_be_cut=may_be_cut)
        return [
            InvalidCall(each["id"], each["function"]["name"], _FORBIDDEN, bad_arguments=False) for each in reply.calls
        ]

    def _begin_turn(self, reply: ModelReply, calls: Iterable[WireCall]) -> Turn:
        sent_calls = map(self._as_sent, calls)
        return self._record.history.begin_turn(reply.text, sent_calls, reasoning=reply.reasoning_fields)

    def _as_sent(self, call: WireCall) -> WireCall:
        """Returns a call with the name that the tool has in requests, which the model may have got wrong."""
        function = call["function"]
        name = self._toolset.find_request_name(function["name"])
        return call if name in (None, function["name"]) else {**call, "function": {**function, "name": name}}

    def _plan(self, read: Sequence[ReadyCall | InvalidCall]) -> list[_PlannedCall]:
        """Returns the calls to make, each once if identical calls are to be made once."""
        if len(read) == 1 or not self._settings.deduplicate_calls:
            return [_PlannedCall(each, [place]) for place, each in enumerate(read)]
        planned: dict[Any, _PlannedCall] = {}
        for place, each in enumerate(read):
            key: Any = place
            if isinstance(each, ReadyCall):
                key = each.call.name, _encode_sorted(each.call.arguments)
            planned.setdefault(key, _PlannedCall(each, [])).places.append(place)
        return list(planned.values())

    async def _ask_for_approval(self, planned: Iterable[_PlannedCall]) -> None:
        approve = self._settings.approve
        if approve is not None:
            for each in planned:
                if isinstance(each.read, ReadyCall):
                    decision = await self._ask(approve, each.read.call)
                    if isinstance(decision, ToolCall) and decision != each.read.call:
                        each.edited = self._read_edited(decision, each.read.call)
                    elif isinstance(decision, str) and decision.strip():
                        each.refusal = f"Refused: {decision}"
                    elif not decision or isinstance(decision, str):
                        each.refusal = _REFUSAL

    async def _ask(self, approve: Approve, call: ToolCall) -> bool | str | ToolCall:
        try:
            answer = approve(call)
            return await answer if inspect.isawaitable(answer) else answer
        # `approve` is a function of the program, so it may raise anything.
        except Exception as exc:
            raise LLMError(
                f"approve raised {type(exc).__name__} for a call of {call.name!r}: {exc}",
                exc,
                hint=_APPROVE_HINT,
                context={"operation": "agent run", "model": self._record.model},
            ) from exc

    def _read_edited(self, edited: ToolCall, requested: ToolCall) -> ReadyCall:
        """Returns the call that the user wants in place of another one.

        Raises:
            LLMError: It cannot be made.
        """
        name = self._toolset.find_request_name(edited.name) or edited.name
        call = {"id": requested.id, "function": {"name": name, "arguments": edited.arguments}}
        read = self._toolset.read(call)
        if isinstance(read, ReadyCall):
            return read
        raise LLMError(
            f"approve returned a call of {edited.name!r} that cannot be made: {read.text}",
            hint=_APPROVE_HINT,
            context={"operation": "agent run", "model": self._record.model},
        )

    async def _answer_all(
        self, planned: Sequence[_PlannedCall], calls: Sequence[ToolCall], turn: Turn
    ) -> list[ToolRecord]:
        records: dict[int, ToolRecord] = {}
        waiting = iter(planned)

        async def answer_waiting() -> None:
            for each in waiting:
                record = await self._record_of(each, calls, turn)
                for place in each.places:
                    is_first = place == each.places[0]
                    records[place] = (
                        record if is_first else attrs.evolve(record, call=calls[place], seconds=0.0, is_duplicate=True)
                    )
                    turn.answer(calls[place].id, record.text, record.images if is_first else ())
                    if self._channel.has_listener:
                        await self._channel.put(ToolCallFinished(records[place]))
                    if len(records) % MANY == 0:
                        await asyncio.sleep(0)

        # A single call, as in most replies, does not need a separate task. The tasks share one iterator, so that
        # thousands of calls do not need thousands of tasks.
        if len(planned) == 1:
            await answer_waiting()
        else:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(planned), self._most_at_once)):
                    group.create_task(answer_waiting())
        return [records[place] for place in range(len(calls))]

    async def _record_of(self, planned: _PlannedCall, calls: Sequence[ToolCall], turn: Turn) -> ToolRecord:
        read = planned.read
        if isinstance(read, InvalidCall):
            return ToolRecord(call=_to_tool_call(read), text=read.text, is_error=True)
        if planned.refusal is not None:
            record = ToolRecord(call=read.call, text=planned.refusal, is_error=True, repaired=read.call.repaired)
            return self._with_repetition_warning(record)
        if self._gate.is_closed:
            await self._gate.wait()
        if read.call.repaired:
            logger.info("a call of %r had small mistakes, and was repaired", read.call.name)
        for place in planned.places:
            turn.begin(calls[place].id)
        if planned.edited is None:
            return self._with_repetition_warning(await self._call_tool(read))
        made = planned.edited.call
        record = await self._call_tool(planned.edited)
        # Without this note, the model would take the result for that of the call that it has requested.
        note = f"[The user changed this call: {made.name}({_encode_sorted(made.arguments).decode()}) was made.]"
        record = attrs.evolve(
            record, call=read.call, repaired=read.call.repaired, edited=made, text=f"{note}\n{record.text}"
        )
        return self._with_repetition_warning(record)

    async def _call_tool(self, ready: ReadyCall) -> ToolRecord:
        call, settings = ready.call, self._settings
        if self._channel.has_listener:
            await self._channel.put(ToolCallStarted(call))
        context = ToolContext(self._run_id, call.id, call.name, self._is_stopping, settings.tool_timeout)
        outcome = await self._toolset.call(
            ready, context, timeout=settings.tool_timeout, max_output=settings.max_tool_output
        )
        return ToolRecord(
            call=call,
            text=outcome.text,
            is_error=outcome.is_error,
            raw=outcome.raw,
            images=outcome.images,
            seconds=outcome.seconds,
            repaired=call.repaired,
        )

    def _with_repetition_warning(self, record: ToolRecord) -> ToolRecord:
        text = self._repetition.note(record.call.name, record.call.arguments, record.text, record.images)
        return record if text is record.text else attrs.evolve(record, text=text)


def _to_tool_call(read: ReadyCall | InvalidCall) -> ToolCall:
    return read.call if isinstance(read, ReadyCall) else ToolCall(read.call_id, read.name, None)


def _as_meant(call: WireCall, read: ReadyCall | InvalidCall) -> WireCall:
    """Returns a call as the model should have written it, if it was repaired."""
    if not isinstance(read, ReadyCall) or not read.call.repaired:
        return call
    function = {**call["function"], "name": read.call.name}
    return {**call, "function": function if read.written is None else {**function, "arguments": read.written}}
