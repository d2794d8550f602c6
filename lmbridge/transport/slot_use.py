"""`SlotUse`: which conversations a server has in its slots.

llama.cpp answers each request in one of its slots, and a slot keeps its conversation until another one takes it. A
conversation that is in none gets the slot that was used least recently (`get_available_slot` in `server-context.cpp`).
So the slots contain the conversations that were used last, as many as there are slots, and the next new one displaces
the oldest of these. This holds exactly if nobody else uses the server, and if each run has one conversation.

Whether a displaced conversation has to be processed again depends on the server. Recent versions of llama.cpp keep it
in memory (`--cache-ram`) until that is full, and other servers share one cache among all requests. No server says so in
advance. But the next reply says how many tokens of the conversation came from a cache, so this is learned: one
conversation may be displaced, and then its next reply decides. If the reply shows that the server forgets, slots are
kept from then on, so no further conversation is displaced that could show the opposite. Therefore this result counts
only for the next 100 requests, and then one conversation may be displaced again. There were two alternatives. Keeping
slots in any case would waste the time of a server that forgets nothing. And the time that an answer takes to begin
would be a poor sign, because it also depends on what else the server is doing.

With several models, nothing is learned, because each has slots of its own, and may have been unloaded in between. Then
slots are kept.

These are slots of the server. Which models may be active, and why the first request for a model goes alone, is in
`scheduler`.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from typing import Final, TypeAlias

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.transport.permits import Permit

_LASTING_REQUESTS: Final = 100
"""The number of requests for which a server that has forgotten a conversation counts as one that forgets."""

Conversation: TypeAlias = ScheduledRun | Permit
"""What a conversation belongs to: a run, or a request outside of any run, which is identified by its permit."""


class SlotUse:
    """Which conversations are in the slots of a server.

    Args:
        slots: The number of slots.
        remembers: The initial value of the attribute `remembers`: what was known about the server before.
    """

    def __init__(self, slots: int, *, remembers: bool | None = None) -> None:
        self.remembers: bool | None = remembers
        """Whether the server, when it was last observed, still had the conversation of a run that had lost its slot;
        None if that is not known."""
        self._slots = slots
        # For a server that counts as one that forgets: the number of requests that have to end before another
        # conversation may be displaced, to find out whether the server still forgets.
        self._requests_left = _LASTING_REQUESTS
        self._models: set[str | None] = set()
        # The number of tokens in the latest prompt of each run.
        self._prompts: weakref.WeakKeyDictionary[ScheduledRun, int] = weakref.WeakKeyDictionary()
        # The conversations whose slots are in use, each with the number of its requests.
        self._busy: Counter[Conversation] = Counter()
        # The other conversations in the slots, in the order in which they were last used.
        self._idle: OrderedDict[Conversation, None] = OrderedDict()
        # The runs that have lost their slot, and whose next request has not ended yet.
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
        self._models.add(permit.model)
        # Of several requests that a displaced run sends at the same time, the first one brings the conversation back.
        permit.was_displaced = permit.run in self._displaced and conversation not in self._busy
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
        self._requests_left -= 1
        if not self._requests_left and self.remembers is False:
            self.remembers, self._models = None, set()

    def note_reply(self, permit: Permit, usage: tuple[int, int | None] | None, *, is_first_attempt: bool) -> None:
        """Records how much of a prompt the server had in a cache, which may show whether it remembers conversations.

        Args:
            permit: The permit of the request, which has not ended yet.
            usage: Two numbers: how many tokens the prompt has, and how many of them came from a cache (None if the
                server does not report that). None in place of both if the reply has no token usage.
            is_first_attempt: Whether the request was sent only once. A further attempt finds in the cache what the
                first one has left there.
        """
        run = permit.run
        if run is None:
            return
        prompt, cached = usage or (0, None)
        before = self._prompts.get(run, 0)
        if prompt:
            self._prompts[run] = prompt
        if not (permit.was_displaced and is_first_attempt):
            return
        if len(self._models) > 1:
            self._learn(remembers=False)
        elif cached is None:
            # This reply shows nothing, so what is known about the server stays as it is. If nothing is known, the
            # server may never report such numbers, and counts as one that forgets.
            self._learn(remembers=bool(self.remembers))
        elif before and prompt >= before:
            # Of a longer prompt, the cache can contain no more than the previous prompt. A shorter prompt shows
            # nothing: the conversation was changed, or the prompt belongs to another one, such as that of a tool.
            self._learn(remembers=2 * cached >= before)

    def _learn(self, *, remembers: bool) -> None:
        self.remembers = remembers
        self._requests_left = _LASTING_REQUESTS

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
