"""`SlotUse`: which conversations a server has in its slots.

llama.cpp answers each request in one of its slots, and a slot keeps its conversation until another one takes it. A
conversation that is in none gets the slot that was used least recently (`get_available_slot` in `server-context.cpp`).
So the slots contain the conversations that were used last, as many as there are slots, and the next new one displaces
the oldest of these. This holds exactly if nobody else uses the server, and if each run has one conversation.

Whether a displaced conversation has to be processed again depends on the server. Recent versions of llama.cpp keep it
in memory (`--cache-ram`) until that is full, and other servers share one cache among all requests. No server says so in
advance. But the reply to the next request of the conversation says how many tokens came from a cache, so this is
learned: one conversation may be displaced, and then its next reply decides. The alternatives were to keep each slot,
which wastes the time of a server that forgets nothing, and to compare how long the answers take to begin, which depends
on what else the server is doing.
"""

from __future__ import annotations

import weakref
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
        self.remembers: bool | None = None
        """Whether the server, when it was last observed, still had the conversation of a run that had lost its slot;
        None if that has not been observed yet."""
        self._slots = slots
        # The number of requests that are in the slot of each conversation that has any.
        self._busy: Counter[Conversation] = Counter()
        # The other conversations in the slots, in the order in which they were last used.
        self._idle: OrderedDict[Conversation, None] = OrderedDict()
        # The runs that have lost their slot, and have had no whole reply since.
        self._displaced: weakref.WeakSet[ScheduledRun] = weakref.WeakSet()

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a slot should be kept for a run: it should, unless the server remembers its conversation anyway.

        As long as that is not known, one run at a time may lose its slot.
        """
        return bool(self._displaced) if self.remembers is None else not self.remembers

    def begin(self, permit: Permit) -> None:
        """Records that a request was sent.

        If its conversation is in a slot, the slot counts as idle until the first event of the reply. Two requests can
        overtake each other on their way, so a new conversation that is sent a moment later may still get this slot.
        """
        conversation = permit.run or permit
        permit.was_displaced = permit.run is not None and permit.run in self._displaced
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

        if permit.was_displaced and permit.run is not None:
            self._displaced.discard(permit.run)

    def note_cached_tokens(self, permit: Permit, cached: int | None, prompt: int) -> None:
        """Records how much of a prompt a server had in a cache, if this shows whether it remembers conversations.

        Args:
            permit: The permit of the request, which has had its whole reply.
            cached: The number of tokens that came from a cache, or None if the server does not say.
            prompt: The number of tokens in the prompt.
        """
        if permit.was_displaced:
            self.remembers = cached is not None and 2 * cached >= prompt

    def forget_run(self, run: ScheduledRun) -> None:
        """Records that a run has ended, so that no request will show whether the server remembers its conversation."""
        self._displaced.discard(run)

    def next_displaced(self) -> Conversation | None:
        """Returns the conversation that a new one would displace, or None if there is a slot without one."""
        is_full = len(self._busy) + len(self._idle) >= self._slots
        return next(iter(self._idle), None) if is_full else None

    def _displace(self) -> None:
        while self._idle and len(self._busy) + len(self._idle) > self._slots:
            conversation, _ = self._idle.popitem(last=False)
            if isinstance(conversation, ScheduledRun) and not conversation.is_over:
                self._displaced.add(conversation)
