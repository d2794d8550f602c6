"""The rounds of a run, a function a stage: ask, listen, make the calls, decide whether to go on."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final

import attrs
import msgspec

from lmbridge.agent.channel import Channel
from lmbridge.agent.events import (
    ReasoningDelta,
    RoundFinished,
    RoundStarted,
    RunEvent,
    TextDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from lmbridge.agent.guards import BadCallGuard, RepetitionGuard, TokenBudget
from lmbridge.agent.history import Turn
from lmbridge.agent.record import Record
from lmbridge.agent.reply import Reply, WireCall
from lmbridge.agent.result import Round, StopReason, ToolRecord
from lmbridge.agent.settings import Approve, Settings
from lmbridge.agent.source import Source, TokenEstimate
from lmbridge.agent.tools import ToolCall, ToolContext
from lmbridge.agent.toolset import InvalidCall, ReadyCall, Toolset
from lmbridge.client.chat_accumulator import ChatAccumulator
from lmbridge.client.names import is_same_model
from lmbridge.client.reasoning import Piece, ReasoningSplitter
from lmbridge.client.stream import ReplyStream
from lmbridge.errors import (
    ContextLengthExceededError,
    LLMError,
    LLMResponseError,
    ModelChangedDuringExecutionError,
)

logger = logging.getLogger("lmbridge.agent")

_MOST_TOKENS: Final = 8192
_MARGIN: Final = 64
"""Tokens that a chat template may add behind what was estimated."""
_LEAST_TOKENS: Final = 16
_RESERVE: Final = 1024
"""Tokens for the answer that history is trimmed for, or a quarter of the context if that is less."""
_BROKEN: Final = ("abort", "error", "content_filter")
"""Finish reasons of an answer that is not whole: vLLM's and SGLang's, OpenRouter's, OpenAI's."""
_REFUSED: Final = "Refused: this call is not allowed. Do something else, or say why you need it."


class Loop:
    """The rounds of one run.

    Args:
        run_id: For the tools.
        source: Where generations come from.
        settings: Its limits.
        tools: Its tools.
        context: Tokens that a request to its model may need, the answer included, if they are known.
        record: Where it writes what it does.
        channel: Where it tells what it does.
        stopping: Whether the run has been cancelled; for tools that cannot be.
    """

    def __init__(
        self,
        run_id: str,
        *,
        source: Source,
        settings: Settings,
        tools: Toolset,
        context: int | None,
        record: Record,
        channel: Channel[RunEvent],
        stopping: Callable[[], bool],
    ) -> None:
        self._run_id = run_id
        self._source = source
        self._settings = settings
        self._tools = tools
        self._record = record
        self._history = record.history
        self._channel = channel
        self._stopping = stopping
        self._estimate = TokenEstimate()
        self._context = context
        self._tools_size = len(msgspec.json.encode(tools.definitions)) if tools.definitions else 0
        self._repetition = RepetitionGuard()
        self._bad_calls = BadCallGuard(settings.max_bad_calls)
        self._budget = TokenBudget(settings.max_total_tokens)

    async def run(self) -> StopReason:
        """Goes on until there is an answer, or a reason to end without."""
        while self._record.rounds < self._settings.max_rounds:
            stop = await self._round()
            if stop is not None:
                return stop
            if self._budget.is_spent:
                return "budget"
        return "max_rounds"

    async def _round(self) -> StopReason | None:
        began = time.monotonic()
        self._record.begin_round()
        if self._channel.is_heard:
            await self._channel.put(RoundStarted(self._record.rounds, self._record.model))
        reply = await self._answer()
        calls = self._calls_of(reply)
        records: Sequence[ToolRecord] = ()
        if calls:
            records = await self._make_calls(calls)
        else:
            self._history.answer(reply.text)
        done = self._logged(reply, records, time.monotonic() - began)
        if self._channel.is_heard:
            await self._channel.put(RoundFinished(done))
        if not calls:
            return "length" if reply.finish_reason == "length" else "stop"
        return "bad_calls" if self._bad_calls.tripped else "repetition" if self._repetition.tripped else None

    def _logged(self, reply: Reply, records: Sequence[ToolRecord], seconds: float) -> Round:
        record = self._record
        done = Round(
            number=record.rounds,
            model=record.served or record.model,
            text=record.text,
            reasoning=record.reasoning,
            finish_reason=reply.finish_reason,
            tool_calls=tuple(records),
            usage=record.round_usage,
            seconds=seconds,
        )
        record.log.append(done)
        return done

    # Asking

    async def _answer(self) -> Reply:
        """The model's answer; one that is empty before any tool was called is asked for once more.

        Raises:
            LLMResponseError: it was empty again.
        """
        reply = await self._ask()
        if not reply.is_empty or self._record.calls:
            return reply
        logger.info("the model answered with nothing; it is asked once more")
        reply = await self._ask()
        if reply.is_empty:
            raise LLMResponseError(
                "the model answered with nothing, twice",
                hint="say more plainly what is to be done, give it fewer tools, or use another model",
                context={"operation": "agent run", "model": self._record.model},
            )
        return reply

    async def _ask(self) -> Reply:
        if self._context is not None:
            self._trim(self._context)
        try:
            return await self._generate()
        except ContextLengthExceededError as error:
            if not self._make_room(error):
                raise
            logger.info("the prompt was too long; it is sent again, trimmed")
        return await self._generate()

    async def _generate(self) -> Reply:
        """One generation: a client is leased for it, and for nothing else."""
        record, size = self._record, self._size
        params: dict[str, Any] = {"max_tokens": self._max_tokens(), "stream_options": {"include_usage": True}}
        if self._tools.definitions:
            params["tools"] = self._tools.definitions
        record.begin_reply()
        async with self._source.lease(record.model) as client:
            stream = await client.chat_completion(self._history.sent(), model=record.model, stream=True, **params)
            reply = await self._listen(stream)
        self._check_whole(reply)
        record.end_reply(reply.text, reply.reasoning)
        self._count(reply, size)
        return reply

    def _check_whole(self, reply: Reply) -> None:
        """Looks for a finish reason that says that the answer is none.

        Raises:
            LLMResponseError: it is there.
        """
        if reply.finish_reason in _BROKEN and not reply.calls:
            raise LLMResponseError(
                f"the server broke the answer off, with the finish reason {reply.finish_reason!r}",
                hint="look into the server's log; what had arrived is in .partial",
                context={"operation": "agent run", "model": self._record.model},
            )

    async def _listen(self, stream: Any) -> Reply:
        """Reads a stream to its end; leaving it in any other way closes it, so that the server stops."""
        # A stream of lmbridge has an accumulator of its own.
        accumulator = None if isinstance(stream, ReplyStream) else ChatAccumulator()

        def so_far() -> Any:
            if accumulator is None:
                return stream.partial
            return accumulator.reply() if accumulator.has_begun else None

        self._record.follow(so_far)
        splitter = None if self._channel.is_muted else ReasoningSplitter()
        served = None
        try:
            async for chunk in stream:
                if accumulator is not None:
                    accumulator.add(chunk)
                if (name := chunk.get("model")) != served:
                    served = name
                    self._check_served(name)
                if splitter is not None:
                    await self._tell(splitter.feed(chunk))
        except BaseException:
            await stream.aclose()
            raise
        if splitter is not None:
            await self._tell(splitter.close())
        return Reply.read(so_far() or {})

    async def _tell(self, pieces: Sequence[Piece]) -> None:
        if self._channel.is_heard:
            for piece in pieces:
                await self._channel.put(TextDelta(piece.text) if piece.kind == "text" else ReasoningDelta(piece.text))

    def _check_served(self, name: str | None) -> None:
        """Compares the name in a reply with that of the rounds before.

        Raises:
            ModelChangedDuringExecutionError: it is another model's.
        """
        first = self._record.served
        if not name or first is None:
            self._record.served = name or first
        elif not (is_same_model(first, name) or is_same_model(name, first)):
            raise ModelChangedDuringExecutionError(
                f"the run began with model {first!r} and went on with {name!r}",
                first,
                name,
                hint="the server swapped models between two rounds; name the model, and see Limits.max_loaded_models",
                context={"operation": "agent run", "model": self._record.model},
            )

    # Tokens

    @property
    def _size(self) -> int:
        return self._history.size + self._tools_size

    def _max_tokens(self) -> int:
        if self._settings.max_tokens != "auto":
            return self._settings.max_tokens
        if self._context is None:
            return _MOST_TOKENS
        left = self._context - self._estimate.tokens(self._size) - _MARGIN
        return max(_LEAST_TOKENS, min(_MOST_TOKENS, left))

    def _count(self, reply: Reply, size: int) -> None:
        """Adds what a reply cost; the guess where the server did not tell."""
        usage = reply.usage or {}
        if reply.usage:
            self._record.count(reply.usage)
        counted = usage.get("total_tokens")
        self._budget.spend(counted or self._estimate.tokens(size) + len(reply.text + reply.reasoning) // 3)
        self._estimate.learn(size, usage.get("prompt_tokens"))

    def _trim(self, context: int, *, least: int = 0) -> bool:
        """Leaves out old messages until prompt and answer fit.

        Args:
            context: Tokens that there are.
            least: Tokens that are to go at least.
        """
        reserve = min(_RESERVE, context // 4)
        excess = max(least, self._estimate.tokens(self._size) - (context - reserve - _MARGIN))
        return excess > 0 and self._history.trim(self._estimate.size(excess))

    def _make_room(self, error: ContextLengthExceededError) -> bool:
        """Learns from an overflow; whether the next request is going to be smaller."""
        self._estimate.learn(self._size, error.prompt_tokens)
        prompt, asked = self._estimate.tokens(self._size), self._max_tokens()
        self._context = error.context_length or self._context or prompt
        # If by our count it would have fitted, our count is wrong.
        fitted = error.prompt_tokens is None and prompt < self._context
        return self._trim(self._context, least=prompt // 4 if fitted else 0) or self._max_tokens() < asked

    # Calls

    def _calls_of(self, reply: Reply) -> Sequence[WireCall]:
        """The calls to make: those that are there, whatever the finish reason says; none of a reply that was cut."""
        if reply.calls or not reply.text:
            return () if reply.is_cut else reply.calls
        calls = self._tools.find_text_call(reply.text)
        if calls:
            self._record.end_reply("", reply.reasoning)
        return calls or ()

    async def _make_calls(self, calls: Sequence[WireCall]) -> list[ToolRecord]:
        """Answers all calls of a turn: together, but in order."""
        turn = self._history.begin_turn(self._record.text, calls)
        asked = [self._tools.read(call) for call in calls]
        self._record.calls += map(_as_call, asked)
        approve = self._settings.approve
        refused = [
            approve is not None and isinstance(each, ReadyCall) and not await self._is_allowed(approve, each.call)
            for each in asked
        ]
        most = self._settings.max_parallel_tools
        places = asyncio.Semaphore(most) if len(asked) > most else nullcontext()
        answers = [
            self._answer_call(each, is_refused, turn, places) for each, is_refused in zip(asked, refused, strict=True)
        ]
        records = await _together(answers)
        self._history.end_turn()
        for each in asked:
            self._bad_calls.note(bad=isinstance(each, InvalidCall))
        return records

    async def _is_allowed(self, approve: Approve, call: ToolCall) -> bool:
        try:
            answer = approve(call)
            return bool(await answer if inspect.isawaitable(answer) else answer)
        except Exception as exc:  # code of the user, which may raise anything
            raise LLMError(
                f"approve raised {type(exc).__name__} for a call of {call.name!r}: {exc}",
                exc,
                hint="it is to return True or False; the call was not made",
                context={"operation": "agent run", "model": self._record.model},
            ) from exc

    async def _answer_call(
        self, asked: ReadyCall | InvalidCall, is_refused: bool, turn: Turn, places: AbstractAsyncContextManager[None]
    ) -> ToolRecord:
        call = _as_call(asked)
        if isinstance(asked, InvalidCall):
            record = ToolRecord(call=call, text=asked.text, is_error=True)
        elif is_refused:
            record = self._noted(ToolRecord(call=call, text=_REFUSED, is_error=True))
        else:
            async with places:
                record = self._noted(await self._call(asked, turn))
        turn.answer(call.id, record.text)
        if self._channel.is_heard:
            await self._channel.put(ToolCallFinished(record))
        return record

    async def _call(self, ready: ReadyCall, turn: Turn) -> ToolRecord:
        call, settings = ready.call, self._settings
        if self._channel.is_heard:
            await self._channel.put(ToolCallStarted(call))
        turn.begin(call.id)
        context = ToolContext(self._run_id, call.id, call.name, self._stopping, settings.tool_timeout)
        outcome = await self._tools.call(
            ready,
            context,
            timeout=settings.tool_timeout,
            max_output=settings.max_tool_output,
        )
        return ToolRecord(
            call=call, text=outcome.text, is_error=outcome.is_error, raw=outcome.raw, seconds=outcome.seconds
        )

    def _noted(self, record: ToolRecord) -> ToolRecord:
        text = self._repetition.note(record.call.name, record.call.arguments, record.text)
        return record if text is record.text else attrs.evolve(record, text=text)


async def _together(answers: Sequence[Coroutine[Any, Any, ToolRecord]]) -> list[ToolRecord]:
    """Awaits them all, side by side; one alone, as there mostly is, needs no task of its own."""
    if len(answers) == 1:
        return [await answers[0]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in answers]
    return [task.result() for task in tasks]


def _as_call(asked: ReadyCall | InvalidCall) -> ToolCall:
    return asked.call if isinstance(asked, ReadyCall) else ToolCall(asked.call_id, asked.name, None)
