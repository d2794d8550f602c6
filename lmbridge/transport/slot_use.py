"""`SlotUse`: which conversations a server has in its slots.

llama.cpp answers each request in one of its slots, and a slot keeps its conversation until another one takes it. A
conversation that is in none gets the slot that was used least recently (`get_available_slot` in `server-context.cpp`).
So the slots contain the conversations that were used last, as many as there are slots, and the next new one displaces
the oldest of these. This holds exactly if nobody else uses the server, and if each run has one conversation.
"""

from __future__ import annotations

from collections import Counter
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
        # The number of requests in flight of each conversation that has any.
        self._busy: Counter[Conversation] = Counter()
        # The other conversations in the slots, in the order in which they were last used.
        self._idle: dict[Conversation, None] = {}

    def begin(self, conversation: Conversation) -> None:
        """Records that a request of a conversation was sent."""
        self._idle.pop(conversation, None)
        self._busy[conversation] += 1
        self._displace()

    def end(self, conversation: Conversation) -> None:
        """Records that a request of a conversation has ended."""
        self._busy[conversation] -= 1
        if not self._busy[conversation]:
            del self._busy[conversation]
            self._idle[conversation] = None
            self._displace()

    def next_displaced(self) -> Conversation | None:
        """Returns the conversation that a new one would displace, or None if there is a slot without one."""
        is_full = len(self._busy) + len(self._idle) >= self._slots
        return next(iter(self._idle), None) if is_full else None

    def _displace(self) -> None:
        while self._idle and len(self._busy) + len(self._idle) > self._slots:
            del self._idle[next(iter(self._idle))]
