"""`SlotUse`: which conversations a server has in its slots.

llama.cpp answers each request in one of its slots, and a slot keeps its conversation until another one takes it. A
conversation that is in none gets the slot that was used least recently (`get_available_slot` in `server-context.cpp`).
So the slots contain the conversations that were used last, as many as there are slots, and the next new one displaces
the oldest of these. This holds exactly if nobody else uses the server, and if each run has one conversation.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TypeAlias

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.transport.permits import Permit

Conversation: TypeAlias = ScheduledRun | Permit
"""What a conversation belongs to: a run, or a request outside of any run, which is identified by its permit."""


class SlotUse:
    """Which conversations are in the slots of a server.

    Args:
        slots: The number of slots.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        # The number of requests that are in the slot of each conversation that has any.
        self._busy: Counter[Conversation] = Counter()
        # The other conversations in the slots, in the order in which they were last used.
        self._idle: OrderedDict[Conversation, None] = OrderedDict()

    def begin(self, permit: Permit) -> None:
        """Records that a request was sent.

        If its conversation is in a slot, the slot counts as idle until the first event of the reply. Two requests can
        overtake each other on their way, so a new conversation that is sent a moment later may still get this slot.
        """
        conversation = permit.run or permit
        permit.is_on_the_way = conversation in self._idle
        if not permit.is_on_the_way:
            self._busy[conversation] += 1
            self._displace()

    def answer(self, permit: Permit) -> None:
        """Records that the first event of a reply has arrived."""
        if permit.is_on_the_way:
            permit.is_on_the_way = False
            conversation = permit.run or permit
            self._idle.pop(conversation, None)
            self._busy[conversation] += 1
            self._displace()

    def end(self, permit: Permit) -> None:
        """Records that a request has ended."""
        conversation = permit.run or permit
        if not permit.is_on_the_way:
            self._busy[conversation] -= 1
            if not self._busy[conversation]:
                del self._busy[conversation]
        permit.is_on_the_way = False
        if conversation not in self._busy:
            self._idle[conversation] = None
            self._idle.move_to_end(conversation)
            self._displace()

    def next_displaced(self) -> Conversation | None:
        """Returns the conversation that a new one would displace, or None if there is a slot without one."""
        is_full = len(self._busy) + len(self._idle) >= self._slots
        return next(iter(self._idle), None) if is_full else None

    def _displace(self) -> None:
        while self._idle and len(self._busy) + len(self._idle) > self._slots:
            self._idle.popitem(last=False)
