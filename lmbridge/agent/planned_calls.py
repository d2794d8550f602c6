"""`PlannedCall`: a call of a reply between the moment when it has been read and the moment when it is made.

A call whose arguments were cut off never gets this far; see `ModelReply.has_cut_call`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
import msgspec

from lmbridge.agent.journal_interface import RecordedCall, RecordedResult
from lmbridge.agent.result import ToolRecord
from lmbridge.agent.tools import ToolCall
from lmbridge.agent.toolset import InvalidCall, ReadyCall

encode_sorted: Final = msgspec.json.Encoder(order="sorted").encode
"""Encodes a value as JSON. Equal objects have the same JSON, whatever the order of their keys."""


@attrs.define(eq=False)
class PlannedCall:
    """A call to make or to refuse, with all calls of the reply that its result answers."""

    read: ReadyCall | InvalidCall
    """The call as it was read."""
    places: list[int]
    """The indices of this call and of its duplicates in the list of the calls of the reply."""
    refusal: str | None = None
    """The refusal that the model reads if the user does not allow the call; None if the call is allowed."""
    edited: ReadyCall | None = None
    """The call that the user wants instead of this one, or None."""
    recorded: RecordedResult | None = None
    """The result from before an interruption, with which the call is not made again; None if the journal has none."""
    is_uncertain: bool = False
    """Whether the call had started before an interruption and may have ended, so that it is not made again."""

    def refused(self, text: str) -> ToolRecord:
        """Returns the record of this call if it is not made, with the reason for the model."""
        call = to_tool_call(self.read)
        return ToolRecord(call=call, text=text, is_error=True, repaired=call.repaired)

    def made_before(self, result: RecordedResult) -> ToolRecord:
        """Returns the record of this call if it was made before an interruption."""
        call = to_tool_call(self.read)
        return ToolRecord(
            call=call,
            text=result.text,
            is_error=result.is_error,
            images=result.images,
            seconds=result.seconds,
            repaired=call.repaired,
            edited=None if self.edited is None else self.edited.call,
        )

    def for_journal(self) -> RecordedCall:
        """Returns what the journal keeps before the call is made. A call that cannot be made already has its result."""
        read = self.read
        call = to_tool_call(read)
        result = RecordedResult(text=read.text, is_error=True) if isinstance(read, InvalidCall) else None
        return RecordedCall(
            place=self.places[0],
            id=call.id,
            name=call.name,
            arguments=call.arguments,
            refusal=self.refusal,
            edited=None if self.edited is None else self.edited.call,
            result=result,
        )


def to_tool_call(read: ReadyCall | InvalidCall) -> ToolCall:
    """Returns the `ToolCall` of a call that was read. That of an invalid call has no arguments."""
    return read.call if isinstance(read, ReadyCall) else ToolCall(read.call_id, read.name, None)


def unite_identical(read: Sequence[ReadyCall | InvalidCall]) -> Iterator[PlannedCall]:
    """Yields a planned call for each call of a reply. Identical calls get the same planned call."""
    planned: dict[Any, PlannedCall] = {}
    for place, each in enumerate(read):
        key: Any = place
        if isinstance(each, ReadyCall):
            key = each.call.name, encode_sorted(each.call.arguments)
        if key not in planned:
            planned[key] = PlannedCall(each, [])
        planned[key].places.append(place)
        yield planned[key]
