"""`Summarizer`: asks the model for the summary that replaces old turns of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from lmbridge.agent.chat_client import ChunkStream
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.continued_messages import Message
from lmbridge.agent.guards import TokenBudget
from lmbridge.agent.journal_interface import RunJournal
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.sampling import sampling_params
from lmbridge.agent.settings import Settings
from lmbridge.agent.text_calls.unread_calls import describe_markup
from lmbridge.agent.toolset import Toolset
from lmbridge.client.chat_accumulator import ChatAccumulator
from lmbridge.client.input_checks import CheckedList
from lmbridge.client.token_count import size_of
from lmbridge.errors import LLMConnectionError, LLMResponseError, LLMStreamError, LLMTimeoutError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_FAILURES: Final = (LLMConnectionError, LLMResponseError, LLMStreamError, LLMTimeoutError)
"""The errors after which a run goes on without a summary. If the server is gone, the next request reports it."""


class Summarizer:
    """Asks the model of one run for summaries, until one of these requests fails.

    Args:
        source: Lends the client for each generation.
        settings: The options of the run.
        toolset: The tools of the run.
        record: Everything that the run has done; the tokens of a summary are added to it.
        token_budget: The tokens that the run may use.
        estimate: Estimates the tokens of a prompt from its bytes. It is used if the server does not count them.
        journal: Keeps the summaries, and replays those from before an interruption. None if the run has no journal.
    """

    def __init__(
        self,
        *,
        source: ClientSource,
        settings: Settings,
        toolset: Toolset,
        record: RunRecord,
        token_budget: TokenBudget,
        estimate: Callable[[int], int],
        journal: RunJournal | None = None,
    ) -> None:
        self._journal = journal
        self._source = source
        self._settings = settings
        self._toolset = toolset
        self._record = record
        self._token_budget = token_budget
        self._estimate = estimate
        self._has_failed = False

    async def __call__(self, messages: list[Message], max_tokens: int) -> str:
        """Returns the summary, or an empty text if the model gave none. After a failure, the model is not asked again.

        Args:
            messages: The conversation, which ends with the request for the summary.
            max_tokens: The number of tokens that the summary may have.
        """
        if self._has_failed or self._token_budget.is_spent:
            return ""
        try:
            reply = await self._next_reply(messages, max_tokens)
        except _FAILURES as error:
            problem: str | None = str(error)
        else:
            if reply is None:
                return ""
            problem = self._problem_of(reply)
            if problem is None:
                return reply.text.strip()
        self._has_failed = True
        logger.warning("old messages are left out without a summary: %s", problem)
        return ""

    def _problem_of(self, reply: ModelReply) -> str | None:
        if reply.calls or describe_markup(reply.text, self._toolset.names) is not None:
            return "the model called a tool where it was asked for a summary"
        return None if reply.text.strip() else "the model wrote none"

    async def _next_reply(self, messages: list[Message], max_tokens: int) -> ModelReply | None:
        """Returns the reply with the summary: the one that the journal has from before an interruption, or a new one.

        None means that the steps of the run are being replayed, and that it had no summary at this point.
        """
        reply = None if self._journal is None else self._journal.next_summary()
        if reply is None:
            if self._journal is not None and self._journal.is_replaying:
                return None
            reply = await self._generate(messages, max_tokens)
            if self._journal is not None:
                await self._journal.add_summary(reply)
        if reply.usage:
            self._record.add_usage(reply.usage)
        self._token_budget.spend(reply.tokens)
        return reply

    async def _generate(self, messages: list[Message], max_tokens: int) -> ModelReply:
        # With the same tools as in the rounds, the server has most of the prompt in its cache.
        has_tools = bool(self._toolset.definitions)
        params: dict[str, Any] = {"stream_options": {"include_usage": True}}
        params |= sampling_params(self._settings.sampling, has_tools=has_tools, is_first_round=False)
        # The length and the form of a summary are decided here, whatever the options say about answers.
        params["max_tokens"] = max_tokens
        params.pop("response_format", None)
        if has_tools:
            params |= {"tools": self._toolset.definitions, "tool_choice": "none"}
        async with self._source.lease(self._record.model) as client:
            stream = await client.chat_completion(
                CheckedList(messages), model=self._record.model, stream=True, **params
            )
            reply = await ModelReply.from_completion(await _collect(stream))
        estimated = self._estimate(sum(map(size_of, messages))) + len(reply.text) // 3
        reply.tokens = (reply.usage or {}).get("total_tokens") or estimated
        return reply


async def _collect(stream: ChunkStream) -> Mapping[str, Any]:
    """Reads a stream to its end. Any exception closes it, so that the server stops generating."""
    accumulator = ChatAccumulator()
    try:
        async for chunk in stream:
            accumulator.add(chunk)
    except BaseException:
        await stream.aclose()
        raise
    return accumulator.reply() if accumulator.has_begun else {}
