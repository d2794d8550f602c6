"""`Approval`: asks the user's `approve` about calls before they are made, and carries out what it decides.

`approve` may allow a call, refuse it, refuse it with a reason for the model, or return the call that is to be made
instead.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from typing import Any, Final

import attrs

from lmbridge._tasks import ITEMS_PER_STEP
from lmbridge._text import shorten
from lmbridge.agent.decision_gate import GatedApproval
from lmbridge.agent.planned_calls import PlannedCall
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.settings import Approve
from lmbridge.agent.tools import ToolCall
from lmbridge.agent.toolset import ReadyCall, Toolset
from lmbridge.errors import LLMError

_REFUSAL: Final = "Refused: this call is not allowed. Do something else, or say why you need it."
_HINT: Final = (
    "approve must return True or False, a text that tells the model why not, or the ToolCall to make instead;"
    " the call was not made"
)
_EXCEPTION_HINT: Final = "the call was not made; to refuse a call, return False or a text that tells the model why not"
_SHOWN_OF_DECISION: Final = 100
"""How many characters of a wrong decision an error quotes."""


class Approval:
    """The decisions of the user about the calls of one run.

    Args:
        approve: See `Agent`. None allows all calls.
        toolset: The tools of the run.
        record: Everything that the run has done. Errors name its model.
    """

    def __init__(self, approve: Approve | None, toolset: Toolset, record: RunRecord) -> None:
        if isinstance(approve, GatedApproval):
            approve = attrs.evolve(approve, task=record.history.task_text)
        self._approve = approve
        self._toolset = toolset
        self._record = record

    async def decide(self, planned: Iterable[PlannedCall]) -> None:
        """Asks about each call that can be made, one after the other, and notes the decision in it.

        Raises:
            LLMError: `approve` raised an exception, or returned a call that cannot be made, or something other than
                a decision. An `LLMError` of `approve` or of the gate keeps its class.
        """
        approve = self._approve
        if approve is None:
            return
        for number, each in enumerate(planned, 1):
            if number % ITEMS_PER_STEP == 0:
                await asyncio.sleep(0)
            # Nobody would want to refuse a search for tools.
            if isinstance(each.read, ReadyCall) and each.read.call.tool is not self._toolset.finder:
                decision = await self._ask(approve, each.read.call)
                if isinstance(decision, ToolCall):
                    if decision != each.read.call:
                        each.edited = await self.read_edited(decision, each.read.call)
                elif decision is not True:
                    each.refusal = self._refusal_of(decision)

    async def _ask(self, approve: Approve, call: ToolCall) -> bool | str | ToolCall:
        try:
            answer = approve(call)
            return await answer if inspect.isawaitable(answer) else answer
        except LLMError as error:
            # The error keeps its class, so that a program can handle a failure of the gate's model like any other.
            error.completed(
                f"{_option_name(approve)} raised this error for a call of {call.name!r}: {error.message}",
                hint=_EXCEPTION_HINT,
                context={"operation": "agent run", "model": self._record.model},
            )
            raise
        # `approve` is a function of the program, so it may raise anything.
        except Exception as exc:
            raise LLMError(
                f"{_option_name(approve)} raised {type(exc).__name__} for a call of {call.name!r}: {exc}",
                exc,
                hint=_EXCEPTION_HINT,
                context={"operation": "agent run", "model": self._record.model},
            ) from exc

    def _refusal_of(self, decision: Any) -> str:
        """Returns the refusal that a decision stands for.

        Raises:
            LLMError: The value is not a decision. A value such as `(False, "no")`, which is true in Python, must not
                approve the call.
        """
        if isinstance(decision, str):
            return f"Refused: {decision}" if decision.strip() else _REFUSAL
        if decision is None or (isinstance(decision, int) and not decision):
            return _REFUSAL
        raise LLMError(
            f"approve returned {shorten(repr(decision), _SHOWN_OF_DECISION)}, which is not a decision",
            hint=_HINT,
            context={"operation": "agent run", "model": self._record.model},
        )

    async def read_edited(self, edited: ToolCall, requested: ToolCall) -> ReadyCall:
        """Returns the call that the user wants in place of the one that the model has requested.

        Raises:
            LLMError: The call cannot be made.
        """
        name = self._toolset.find_request_name(edited.name) or edited.name
        call = {"id": requested.id, "function": {"name": name, "arguments": edited.arguments}}
        (read,) = await self._toolset.read_all([call])
        if isinstance(read, ReadyCall):
            return read
        raise LLMError(
            f"approve returned a call of {edited.name!r} that cannot be made: {read.text}",
            hint=_HINT,
            context={"operation": "agent run", "model": self._record.model},
        )


def _option_name(approve: Approve) -> str:
    """Returns the name of the agent's option that an error about a decision mentions."""
    return approve.option_name if isinstance(approve, GatedApproval) else "approve"
