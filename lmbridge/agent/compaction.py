"""Makes room in the context of a run, in tiers: old results are shortened, and old turns are summarized or left out.

A run outgrows the context of a local model within a dozen calls. Leaving out only as many of the oldest calls as
necessary would be simpler. But the model then repeats what it has forgotten, and each request changes the beginning of
the prompt, so that the server processes all of it again. So the tiers go from the cheapest loss to the most expensive
one, and each makes more room than necessary, so that the next rounds only add to the prompt.

The terms are those that others use. `TieredCompact` of Forge (https://pypi.org/project/forge-guardrails/) has similar
tiers, but never asks the model. LangChain's `ClearToolUsesEdit` corresponds to the shortening of results, and its
`SummarizationMiddleware` to the summaries (https://docs.langchain.com/oss/python/langchain/middleware/built-in).
Claude's API calls these two "context editing" and "compaction"
(https://platform.claude.com/docs/en/build-with-claude/context-editing).

The model can get back what it has lost by making the same call again. So a result that it has requested a second time
is not shortened a second time, and such a repetition is not taken as a sign that the model goes in circles.

The summary and the list of calls that were left out follow the task, in the same message. A separate message would
be a second user message in a row, or an answer before a call, and chat templates refuse one or the other. The new
summary and list replace those of an earlier compaction; the model still sees the old ones while it writes the summary.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias

from lmbridge._text import shorten
from lmbridge.agent.continued_messages import Message
from lmbridge.agent.history import Groups, History
from lmbridge.agent.result import CompactionKind, CompactionStep
from lmbridge.agent.settings import CompactionMode
from lmbridge.agent.tokens import ContextBudget
from lmbridge.client.token_count import size_of
from lmbridge.errors import ContextLengthExceededError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

Summarize: TypeAlias = Callable[[list[Message], int], Awaitable[str]]
"""Returns the model's summary of a conversation, within a limit on its tokens, or an empty text if it gave none."""

_SHARE_AFTER_SHORTENING: Final = 0.7
"""The system message and the task are always sent whole. Results are shortened until all other messages together take
only this share of the room that these two leave."""
_SHARE_AFTER_LEAVING_OUT: Final = 0.5
"""Messages are left out until those that remain take only this share of the same room. The share is smaller than the
one above, so that fewer summaries are needed, each of which costs a generation."""
_LONG_RESULT: Final = 1_200
"""The number of characters above which an old result is shortened."""
_SHORT_RESULT: Final = 600
"""The number of characters that remain of a shortened result."""
_SMALL_CONTEXT: Final = 4_096
"""In a context of fewer tokens than this, summaries and lists of calls would take too much room."""
_WORTH_SUMMARIZING: Final = 1_000
"""If the turns to leave out have fewer tokens than this, a summary would cost more than it saves."""
_SUMMARY_TOKENS: Final = 768
"""The largest number of tokens that a summary may have."""
_SHORTEST_SUMMARY_TOKENS: Final = 256
"""If the context leaves fewer tokens than this for a summary, none is requested."""
_LISTED_CHARACTERS: Final = 1_000
"""The most characters that the list of calls may have."""
_LISTED_ARGUMENTS: Final = 80
"""The number of characters that the list shows of the arguments of a call."""
_NOTE_BYTES: Final = 2_000
"""The bytes that are kept free for the note that follows the task."""

_CONTEXT_IS_FULL: Final = "(The context is full.)"
_ASK_FOR_SUMMARY: Final = (
    "All messages after the task are about to be removed, because the context is full. Write notes that are enough to"
    " finish the task without them: what is done, what is left to do, and every name, number, path, id and code from"
    " the results that may be needed, exactly as it was. Repeat the notes that follow the task, if there are any. Do"
    " not call tools. Write at most 300 words."
)


class Compactor:
    """Keeps the messages that one run sends within the model's context.

    Args:
        history: The conversation.
        context: Estimates how much fits into the context.
        mode: The option `compaction` of the run.
        summarize: Asks the model for a summary.
        report: A function that is called with each step that made room.
    """

    def __init__(
        self,
        history: History,
        context: ContextBudget,
        *,
        mode: CompactionMode,
        summarize: Summarize,
        report: Callable[[CompactionStep], Awaitable[None]],
    ) -> None:
        self._history = history
        self._context = context
        self._mode = mode
        self._summarize = summarize
        self._report = report
        self._summary = ""
        # Descriptions of the calls that are no longer sent, the oldest first.
        self._calls: list[str] = []

    async def fit(self) -> None:
        """Makes room if the context length is known, and prompt and answer do not fit into the context."""
        excess = self._context.excess()
        if excess > 0:
            await self._compact(excess)

    async def make_room(self, error: ContextLengthExceededError) -> bool:
        """Learns from a prompt that was too long, makes room, and returns whether the next request will be smaller."""
        size, max_tokens = self._history.size, self._context.max_tokens()
        excess = self._context.learn_overflow(error)
        if excess > 0:
            await self._compact(excess)
        return self._history.size < size or self._context.max_tokens() < max_tokens

    async def _compact(self, excess: int) -> None:
        history = self._history
        limit = history.size - self._context.size_of(excess)
        room = max(0, limit - history.fixed_size)
        goal = limit - round((1 - _SHARE_AFTER_SHORTENING) * room)
        # The model summarizes what it has been sent, which is in the server's prompt cache.
        sent = history.groups()
        if self._mode != "drop":
            size = history.size
            count = history.shorten_results(goal, longer_than=_LONG_RESULT, kept=_SHORT_RESULT)
            await self._report_step("shorten", count, size)
        if history.size > goal:
            await self._leave_out(limit - round((1 - _SHARE_AFTER_LEAVING_OUT) * room), sent)
        if history.size > limit and self._mode != "drop":
            size = history.size
            count = history.shorten_last_results(limit, kept=_SHORT_RESULT)
            await self._report_step("shorten", count, size)

    async def _leave_out(self, goal: int, sent: Groups) -> None:
        history, is_small = self._history, self._context.is_shorter_than(_SMALL_CONTEXT)
        # The note is about turns of this run. The last turn is never left out, so a single turn needs no note.
        has_notes = self._mode != "drop" and not is_small and len(sent.after_task) > 1
        before, after = history.count_oldest(goal - _NOTE_BYTES if has_notes else goal)
        left_out = Groups(sent.before_task[:before], sent.after_task[:after])
        summary = await self._summary_of(left_out) if has_notes and self._mode == "summarize" else ""
        self._summary = summary or self._summary
        messages = [message for group in (*left_out.before_task, *left_out.after_task) for message in group]
        self._calls += [_describe_call(call) for group in left_out.after_task for call in _calls_in_group(group)]
        size = history.size
        history.leave_out(before, after, note=self._note() if has_notes and after else "")
        await self._report_step("summarize" if summary else "drop", len(messages), size, summary)

    async def _summary_of(self, left_out: Groups) -> str:
        """Returns the model's summary of what is left out; an empty text if it fails or is not worth its cost."""
        context, turns = self._context, _size_of_groups(left_out.after_task)
        if turns < context.size_of(_WORTH_SUMMARIZING):
            return ""
        request = [
            *self._history.with_head_and_task(left_out),
            {"role": "assistant", "content": _CONTEXT_IS_FULL},
            {"role": "user", "content": _ASK_FOR_SUMMARY},
        ]
        max_tokens = min(_SUMMARY_TOKENS, context.tokens_left(sum(map(size_of, request))))
        if max_tokens < _SHORTEST_SUMMARY_TOKENS:
            return ""
        summary = await self._summarize(request, max_tokens)
        return summary if 2 * len(summary.encode()) < turns else ""

    def _note(self) -> str:
        """Returns the text that follows the task; an empty one if there is nothing to say."""
        listed, characters = list[str](), 0
        for call in reversed(self._calls):
            characters += len(call) + 2
            if characters > _LISTED_CHARACTERS:
                break
            listed.insert(0, call)
        number, hidden = len(self._calls), len(self._calls) - len(listed)
        more = f", and before them {hidden} others" if hidden else ""
        removed = f"[To save room, {number} earlier calls and their results were removed: {', '.join(listed)}{more}.]"
        notes = f"[Your own notes on the messages that were removed:]\n{self._summary}"
        return "\n".join(filter(None, [removed if number else "", notes if self._summary else ""]))

    async def _report_step(self, kind: CompactionKind, messages: int, size_before: int, summary: str = "") -> None:
        if not messages:
            return
        tools_size = self._context.tools_size
        step = CompactionStep(
            kind=kind,
            messages=messages,
            tokens_before=self._context.tokens_of(size_before + tools_size),
            tokens_after=self._context.tokens_of(self._history.size + tools_size),
            summary=summary,
        )
        logger.info(
            "the context is full: %d messages were %s, which reduces the prompt from about %d to about %d tokens",
            messages,
            {"shorten": "shortened", "summarize": "replaced by a summary", "drop": "left out"}[kind],
            step.tokens_before,
            step.tokens_after,
        )
        await self._report(step)


def _size_of_groups(groups: Sequence[Sequence[Message]]) -> int:
    return sum(size_of(message) for group in groups for message in group)


def _calls_in_group(group: Sequence[Message]) -> list[Any]:
    return [call["function"] for message in group for call in message.get("tool_calls", ())]


def _describe_call(function: Message) -> str:
    return f"{function['name']}({shorten(function['arguments'], _LISTED_ARGUMENTS)})"
