"""Decides what a resumed run does with the calls that its journal has from before the interruption.

- A call that had ended is not made again: its result is replayed.
- A call that had started may have happened, so the model reads that it is uncertain. Only a call of a tool that is
  idempotent is made again.
- A call that was only planned is made, or refused, as it was decided before.

`Agent.resume` begins in `agent`, and checks the stored options with `journal.stored_options`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lmbridge.agent.approval import Approval
from lmbridge.agent.journal_interface import RecordedCall
from lmbridge.agent.planned_calls import PlannedCall
from lmbridge.agent.toolset import ReadyCall
from lmbridge.errors import JournalError


async def replay_decisions(
    planned: Iterable[PlannedCall], recorded: Mapping[int, RecordedCall], approval: Approval
) -> None:
    """Takes over the state that the calls of a reply had before the interruption.

    Args:
        planned: The calls of the reply.
        recorded: The calls of the reply in the journal, by their places.
        approval: Reads the calls that the user wanted instead of others.

    Raises:
        JournalError: The journal does not have one of the calls.
        LLMError: A call that the user wanted instead of another one can no longer be made.
    """
    for each in planned:
        call = recorded.get(each.places[0])
        if call is None:
            raise JournalError(
                "the journal does not have all calls of a reply",
                problem="mismatch",
                hint="resume the run with the options and the version of lmbridge with which it began",
            )
        each.recorded, each.refusal = call.result, call.refusal
        if not isinstance(each.read, ReadyCall):
            continue
        if call.edited is not None:
            each.edited = await approval.read_edited(call.edited, each.read.call)
        tool = (each.edited or each.read).call.tool
        each.is_uncertain = call.has_started and not (tool is not None and tool.is_idempotent)
