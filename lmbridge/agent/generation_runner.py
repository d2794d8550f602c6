"""`GenerationRunner`: requests one generation after another for a run, and reads each from its stream.

Every generation is streamed, although only some runs have a listener. A server notices that a client has left only when
it next sends something to the client, so without a stream, it would generate the whole reply even after the run was
cancelled. A client is leased for one generation and never across a tool call: otherwise ten agents that wait for their
tools would occupy a pool of ten clients, and a tool that runs another agent would wait for itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from lmbridge._checks import is_integer
from lmbridge._tasks import ITEMS_PER_STEP, end_task, list_in_slices, pause_after
from lmbridge.agent.channel import Channel
from lmbridge.agent.chat_client import ChunkStream
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.constrained_retry import ConstrainedRetry
from lmbridge.agent.events import ReasoningDelta, RunEvent, TextDelta
from lmbridge.agent.guards import TokenBudget
from lmbridge.agent.model_changes import check_served_model
from lmbridge.agent.model_reply import ModelReply, WireCall
from lmbridge.agent.progress import ProgressReporter
from lmbridge.agent.prompt_cache import PromptCacheWatch
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.sampling import allows_calls, sampling_params
from lmbridge.agent.settings import Settings
from lmbridge.agent.text_calls.finding import may_have_calls
from lmbridge.agent.text_calls.held_text import HeldText
from lmbridge.agent.text_calls.unread_calls import repeated_unit
from lmbridge.agent.thinking import without_thinking
from lmbridge.agent.tokens import ContextBudget
from lmbridge.agent.toolset import Toolset
from lmbridge.agent.typed_output import OutputReader
from lmbridge.client.chat_accumulator import ChatAccumulator
from lmbridge.client.context_overflow import OVERFLOW_HINT, PromptSize, describe_cut
from lmbridge.client.reasoning import Piece, ReasoningSplitter
from lmbridge.client.reply_stream import ReplyStream
from lmbridge.client.structured import answer_in_reasoning
from lmbridge.client.surrogates import Halves, join_halves, rest_of_halves
from lmbridge.errors import ContextLengthExceededError, LLMResponseError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_CONTENT_FILTER: Final = "content_filter"
"""The finish reason with which OpenAI ends an answer that its filter has cut off. For the other finish reasons of an
aborted answer, such as "error", the `ChatAccumulator` that reads the reply raises an error itself."""
_LARGE_TEXT: Final = 20_000
"""The number of characters beyond which a reply is searched for calls in a thread."""


class GenerationRunner:
    """Requests the generations of one run.

    Args:
        source: Lends the client for each generation.
        settings: The options of the run.
        toolset: The tools of the run.
        record: Everything that the run has done; replies and tokens are written to it.
        channel: Carries the events of the run.
        context: The room that the conversation has in the model's context.
        token_budget: The tokens that the run may use.
        retry: Decides whether a request is constrained to the schema of a tool.
        output: Reads the typed output of the run; None if its answer is a text.

    Attributes:
        may_call: Whether requests offer the tools. It is set to False for a request that asks only for the answer.
        has_results: Whether a tool has returned something so far, without an error.
        stops_thinking: Whether requests ask the model not to think, because its last thought was too long.
    """

    def __init__(
        self,
        *,
        source: ClientSource,
        settings: Settings,
        toolset: Toolset,
        record: RunRecord,
        channel: Channel[RunEvent],
        context: ContextBudget,
        token_budget: TokenBudget,
        retry: ConstrainedRetry,
        output: OutputReader | None,
    ) -> None:
        self._source = source
        self._settings = settings
        self._toolset = toolset
        self._record = record
        self._history = record.history
        self._channel = channel
        self._context = context
        self._token_budget = token_budget
        self._retry = retry
        self._output = output
        self.may_call = True
        self.has_results = False
        self.stops_thinking = False
        self._progress = ProgressReporter(source, channel, record.model, record.watch)
        self._cache_watch = PromptCacheWatch()
        self._has_warned_of_overflow = False
        # Set while a reply arrives if its text may contain calls.
        self._held_text: HeldText | None = None

    async def run(self) -> ModelReply:
        """Requests one generation, and returns its reply. A client is leased for its duration only."""
        record, prompt_size = self._record, self._context.prompt_size
        params = self._params()
        wrong_tool = self._retry.next_tool(record.model, params)
        if wrong_tool is not None:
            params["response_format"] = self._retry.response_format(wrong_tool)
        record.begin_reply()
        mode = self._settings.read_text_calls
        self._held_text = None
        if not self._channel.is_muted and allows_calls(params) and (mode != "never" or wrong_tool is not None):
            self._held_text = HeldText(
                self._toolset.resolve_name, is_whole=mode == "whole", holds_all=wrong_tool is not None
            )
        async with self._source.lease(record.model) as client:
            watching = self._progress.watch_loading(client)
            try:
                messages = self._history.to_send()
                stream = await client.chat_completion(messages, model=record.model, stream=True, **params)
                reply = await self._read_stream(stream, watching)
            finally:
                if watching is not None:
                    await end_task(watching)
        # A `max_tokens` in `extra_body` may be anything; llama.cpp takes -1 for no limit.
        max_tokens = params["max_tokens"]
        reply.max_tokens = max_tokens if is_integer(max_tokens) and max_tokens > 0 else None
        reply.has_stop_texts = "stop" in params
        self._check_complete(reply)
        if self._output is not None and reply.is_only_reasoning and not reply.calls:
            reply.text = answer_in_reasoning(reply.reasoning)
        if self._context.is_unknown:
            self._context.learn_context_length(await self._source.context_length_after_reply(record.model))
        self._count_tokens(reply, prompt_size)
        lost = self._cache_watch.compare(messages, params.get("tools"), reply.usage)
        if lost is not None and self._channel.has_listener:
            await self._channel.put(lost)
        reply.may_call = allows_calls(params)
        reply.constrained_to = wrong_tool
        has_read = self._retry.read(reply)
        if reply.constrained_to is None and not self.has_results:
            reply.drop_cut_repetition()
        if not (has_read or reply.calls) and reply.may_call:
            has_read = await self._read_text_calls(reply)
        reply.is_of_text_caller = record.model in self._source.text_callers
        if self._held_text is not None:
            await self._send_held_text("" if self._retry.is_unusable(reply) else reply.text if has_read else None)
        record.end_reply(reply.text, reply.reasoning)
        await pause_after(len(reply.text) + len(reply.reasoning))
        return reply

    def _params(self) -> dict[str, Any]:
        """Returns the fields of the next request, apart from its model and its messages."""
        params: dict[str, Any] = {
            "max_tokens": self._context.max_tokens(),
            "stream_options": {"include_usage": True},
        }
        response_format = None if self._output is None else self._output.response_format
        if response_format is not None:
            params["response_format"] = response_format
        elif self._toolset.definitions and self.may_call:
            params["tools"] = self._toolset.definitions
        params |= sampling_params(
            self._settings.sampling, has_tools="tools" in params, is_first_round=self._record.rounds <= 1
        )
        params |= self._progress.params()
        if self.stops_thinking:
            params = without_thinking(params, self._source.server_kinds.get(self._record.model))
        return params

    async def _read_text_calls(self, reply: ModelReply) -> bool:
        """Reads the calls that the model wrote as text, and adds them to the reply as its calls.

        Returns:
            Whether there were any.
        """
        settings = self._settings
        size = len(reply.text) + len(reply.reasoning)
        if settings.read_text_calls == "never" or not may_have_calls(reply.text or reply.reasoning):
            return False
        # If a reply was cut off while it repeated its only call, nothing is missing. But if the model already has
        # results and still repeats a call like this, it has lost its way, and has to be asked for its answer.
        is_cut = reply.finish_reason == "length" and settings.deduplicate_calls and not self.has_results
        unit = repeated_unit(reply.text) if is_cut else None
        find = partial(
            self._toolset.find_text_calls,
            reply.text if unit is None else unit,
            reasoning=reply.reasoning,
            mode=settings.read_text_calls,
            repairs=settings.repair_calls,
            may_be_cut=unit is None and reply.may_be_cut,
        )
        found = find() if size <= _LARGE_TEXT else await asyncio.to_thread(find)
        if found is not None:
            logger.info("the model wrote its tool calls as text; they are read from the text")
            reply.written_calls = reply.text if reply.text.strip() else reply.reasoning
            reply.text, reply.calls = found
            self._source.text_callers.add(self._record.model)
            if settings.deduplicate_calls:
                # The duplicates can be dropped, because servers demand results only for calls that they have parsed
                # themselves. A long list of the same call and the same result would be an example that the model
                # follows.
                reply.calls = await _without_duplicates(reply.calls)
        return found is not None

    def _check_complete(self, reply: ModelReply) -> None:
        """Checks that the server has not aborted the answer.

        Raises:
            LLMResponseError: The finish reason says that the answer was aborted.
        """
        if reply.finish_reason == _CONTENT_FILTER:
            raise LLMResponseError(
                f"the server aborted the answer, with the finish reason {reply.finish_reason!r}",
                hint="check the server's log; what had arrived is in .partial",
                context={"operation": "agent run", "model": self._record.model},
            )

    async def _read_stream(self, stream: ChunkStream, watching: asyncio.Task[None] | None) -> ModelReply:
        """Reads a stream to its end. Any exception closes the stream, so that the server stops generating.

        Args:
            stream: The stream.
            watching: The task that reports the loading of the model, or None. It is cancelled now that there is a
                stream.
        """
        if watching is not None:
            watching.cancel()
        # A stream of lmbridge's own client accumulates its chunks. Those of another client are accumulated here.
        accumulator = ChatAccumulator()
        own = stream if isinstance(stream, ReplyStream) else None
        arrived = accumulator if own is None else own

        def reply_so_far() -> Any:
            so_far = accumulator.reply() if accumulator.has_begun else None
            return so_far if own is None else own.partial

        self._record.attach_stream(reply_so_far)
        splitter = None if self._channel.is_muted else ReasoningSplitter()
        reports_progress = self._progress.may_be_wanted
        halves: Halves = {}
        served_model: str | None = None
        may_change = own is not None and own.ignores_model_names
        try:
            async for chunk in stream:
                if own is None:
                    chunk = join_halves(accumulator.add(chunk), halves)  # noqa: PLW2901 - what is missing was filled in
                # While a proxy loads a model, it names itself as the model, so a name counts only once an answer has
                # begun.
                name = chunk.get("model")
                if name != served_model and isinstance(name, str) and arrived.has_answer:
                    check_served_model(self._record, name, begins_reply=served_model is None, may_change=may_change)
                    served_model = name
                if reports_progress:
                    await self._progress.report(chunk)
                if splitter is not None:
                    await self._send_chunk(splitter, chunk)
                elif own is not None and served_model is not None and not reports_progress:
                    # Nobody needs the remaining chunks one by one. The stream itself breaks off if another model
                    # continues the answer, so `collect` can read the rest.
                    break
        except BaseException:
            # The caller no longer reads the stream, so the server should stop generating now.
            await stream.aclose()
            raise
        if splitter is not None:
            await self._send_rest(splitter, halves)
        if own is not None:
            return await self._collect(own, served_model)
        return await ModelReply.from_completion(await accumulator.reply_in_slices() if accumulator.has_begun else {})

    async def _collect(self, stream: ReplyStream[Any, Any], served_model: str | None) -> ModelReply:
        """Reads what is left of a stream, and returns the whole reply.

        Args:
            stream: A stream of lmbridge's own client.
            served_model: The last name of a model that was checked, or None if there was none.
        """
        completion = await stream.collect()
        name = completion.get("model")
        if served_model is not None and name != served_model and isinstance(name, str):
            # A chunk that was read only by `collect` names another model.
            check_served_model(self._record, name, begins_reply=False, may_change=stream.ignores_model_names)
        return await ModelReply.from_completion(completion)

    async def _send_chunk(self, splitter: ReasoningSplitter, chunk: Mapping[str, Any]) -> None:
        """Sends the text of a chunk as events, and lets other tasks run after every 100 choices."""
        choices = chunk["choices"]
        if len(choices) <= ITEMS_PER_STEP:
            await self._send_deltas(splitter.feed(chunk))
            return
        for begin in range(0, len(choices), ITEMS_PER_STEP):
            await self._send_deltas(splitter.feed({"choices": choices[begin : begin + ITEMS_PER_STEP]}))
            await asyncio.sleep(0)

    async def _send_deltas(self, pieces: Sequence[Piece]) -> None:
        if self._channel.has_listener:
            for piece in pieces:
                if piece.kind == "reasoning":
                    await self._channel.put(ReasoningDelta(piece.text))
                elif text := self._held_text.feed(piece.text) if self._held_text is not None else piece.text:
                    await self._channel.put(TextDelta(text))

    async def _send_rest(self, splitter: ReasoningSplitter, halves: Halves) -> None:
        """Sends what can only be sent at the end of a reply: what the splitter and `join_halves` held back."""
        if (rest := rest_of_halves(halves)) is not None:
            await self._send_deltas(splitter.feed(rest))
        await self._send_deltas(splitter.close())

    async def _send_held_text(self, text_before_calls: str | None) -> None:
        """Sends the text that was held because it could be a call.

        Args:
            text_before_calls: If calls were found in the text of the reply, the text before them; otherwise None.
        """
        held, self._held_text = self._held_text, None
        if held is not None and self._channel.has_listener and (text := held.rest(text_before_calls)):
            await self._channel.put(TextDelta(text))

    def _count_tokens(self, reply: ModelReply, prompt_size: int) -> None:
        """Adds the tokens of a new reply to those of the run, or an estimate if the server did not count them."""
        estimated = self._context.tokens_of(prompt_size) + len(reply.text + reply.reasoning) // 3
        reply.tokens = (reply.usage or {}).get("total_tokens") or estimated
        self.add_tokens(reply, prompt_size)

    def add_tokens(self, reply: ModelReply, prompt_size: int) -> None:
        """Adds the tokens of a reply to those of the run, and learns from them how many tokens the prompt had.

        Args:
            reply: The reply.
            prompt_size: The size of its prompt, in the unit of `ContextBudget.prompt_size`.

        Raises:
            ContextLengthExceededError: The server has cut the prompt, and `context_overflow` is "raise".
        """
        if reply.usage:
            self._record.add_usage(reply.usage)
        self._token_budget.spend(reply.tokens)
        counted, prompt = (reply.usage or {}).get("prompt_tokens"), self._context.compared(prompt_size)
        if prompt is None or not counted or not prompt.was_cut(counted):
            self._context.learn(prompt_size, counted)
        else:
            # The server has counted only what was left of the prompt, so there is nothing to learn from its count.
            self.report_overflow(describe_cut(counted, prompt.context_length), prompt)

    def report_overflow(self, message: str, prompt: PromptSize) -> None:
        """Warns once in a run, or raises, about a prompt that is too long or was cut by the server.

        Raises:
            ContextLengthExceededError: `context_overflow` is "raise".
        """
        if self._settings.context_overflow == "raise":
            raise ContextLengthExceededError(
                message,
                prompt_tokens=prompt.tokens,
                context_length=prompt.context_length,
                hint=OVERFLOW_HINT,
                context={"operation": "agent run", "model": self._record.model},
            )
        if not self._has_warned_of_overflow:
            self._has_warned_of_overflow = True
            self._record.warn(message)


async def _without_duplicates(calls: Sequence[WireCall]) -> Sequence[WireCall]:
    """Returns the calls without those that repeat an earlier call word for word."""
    firsts = await list_in_slices(_first_of_identical(calls))
    return list(dict(zip(map(id, firsts), firsts, strict=True)).values())


def _first_of_identical(calls: Iterable[WireCall]) -> Iterator[WireCall]:
    """Yields, for each call, the first one that was written in the same way."""
    firsts: dict[tuple[str, str], WireCall] = {}
    for each in calls:
        yield firsts.setdefault((each["function"]["name"], each["function"]["arguments"]), each)
