"""`RunLoop`: the rounds of a run, one method for each stage.

A round asks the model, reads its reply, makes the calls that are in it, and decides whether to go on. A graph of nodes,
as some agent frameworks have it, was considered and rejected: the order of the stages never changes, and plain methods
show it in a stack trace. The state behind the decisions is kept in other modules and tested separately: the
conversation in `history`, tokens in `tokens`, and calls and the reasons to stop that they give in `turns`.

Every generation is streamed, although only some runs have a listener. Servers notice that a client has left only when
they write to it next, so a plain request would be generated to its end after the run was cancelled. A client is leased
for one generation and never across a tool call: otherwise ten agents that wait for their tools would occupy a pool of
ten clients, and a tool that runs another agent would wait for itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from lmbridge.agent.channel import Channel
from lmbridge.agent.chat_client import ChunkStream
from lmbridge.agent.events import (
    ModelNudged,
    ReasoningDelta,
    RoundFinished,
    RoundStarted,
    RunEvent,
    TextDelta,
)
from lmbridge.agent.guards import TokenBudget
from lmbridge.agent.held_text import HeldText
from lmbridge.agent.nudges import Nudges, find_flaw, text_or_placeholder
from lmbridge.agent.output import OutputReader
from lmbridge.agent.pause import PauseGate
from lmbridge.agent.reasoning_replay import demanded_field
from lmbridge.agent.record import RunRecord
from lmbridge.agent.reply import ModelReply
from lmbridge.agent.result import Nudge, NudgeKind, Round, StopReason, ToolRecord
from lmbridge.agent.result_images import ImagePlace, next_place, place_after
from lmbridge.agent.sampling import allows_calls, sampling_params
from lmbridge.agent.settings import Settings
from lmbridge.agent.source import ClientSource
from lmbridge.agent.text_calls import may_have_calls
from lmbridge.agent.tokens import ContextBudget
from lmbridge.agent.toolset import Toolset
from lmbridge.agent.turns import TurnRunner
from lmbridge.agent.unread_calls import describe_markup
from lmbridge.client.chat_accumulator import ChatAccumulator
from lmbridge.client.names import is_same_model
from lmbridge.client.reasoning import Piece, ReasoningSplitter
from lmbridge.client.stream import ReplyStream
from lmbridge.client.structured import InvalidAnswerError, answer_in_reasoning
from lmbridge.client.surrogates import Halves, join_halves, rest_of_halves
from lmbridge.errors import (
    ContextLengthExceededError,
    LLMResponseError,
    LLMStreamError,
    ModelChangedDuringExecutionError,
)

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_BROKEN_FINISH_REASONS: Final = ("abort", "error", "content_filter")
"""Finish reasons of an answer that is incomplete: those of vLLM and SGLang, of OpenRouter, and of OpenAI."""
_LIMIT_REACHED: Final = "(The limit on tool calls was reached.)"
_LAST_QUESTION: Final = (
    "You cannot call any more tools. Give the best answer that you can from what you know so far, and say what is"
    " missing in it."
)
_LARGE_TEXT: Final = 20_000
"""The number of characters beyond which a reply is searched for calls in a thread."""
_EMPTY_ANSWER_HINT: Final = "describe the task in more detail, offer fewer tools, or use another model"
_MISSING_CALL_HINT: Final = "check that the server's tool parser and the chat template fit the model"


class RunLoop:
    """The rounds of one run.

    Args:
        run_id: The id of the run, for its tools.
        source: Lends the client for each generation.
        settings: The options of the run.
        toolset: The tools of the run.
        context_length: The number of tokens in the model's context, the answer included; None if it is unknown.
        record: Everything that the run has done; the loop writes to it.
        channel: Carries the events of the run.
        is_stopping: Returns True if the run has been cancelled. Tools in threads poll it, because threads cannot be
            cancelled.
        gate: Holds the run before each generation and each call while the run is paused.
    """

    def __init__(
        self,
        run_id: str,
        *,
        source: ClientSource,
        settings: Settings,
        toolset: Toolset,
        context_length: int | None,
        record: RunRecord,
        channel: Channel[RunEvent],
        is_stopping: Callable[[], bool],
        gate: PauseGate,
    ) -> None:
        self._gate = gate
        self._source = source
        self._settings = settings
        self._toolset = toolset
        self._record = record
        self._history = record.history
        self._channel = channel
        self._context = ContextBudget(
            record.history,
            tools_size=_definitions_size(toolset),
            context_length=context_length,
            max_tokens=settings.max_tokens,
        )
        has_tools = bool(toolset.definitions)
        self._output = None if settings.output_type is None else OutputReader(settings.output_type, has_tools=has_tools)
        self._may_call = True
        self._token_budget = TokenBudget(settings.max_total_tokens)
        self._nudges = Nudges(toolset, settings.max_nudges, settings.read_text_calls != "never")
        self._turns = TurnRunner(
            run_id,
            settings=settings,
            toolset=toolset,
            record=record,
            channel=channel,
            is_stopping=is_stopping,
            gate=gate,
        )
        record.history.image_place = source.image_places.get(record.model, "user")
        self._has_shown_images = False
        # Set while a reply arrives whose text may have calls in it.
        self._held_text: HeldText | None = None
        field = source.demanded_reasoning_fields.get(record.model)
        if settings.send_reasoning is True or (settings.send_reasoning == "auto" and field is not None):
            record.history.send_reasoning(field)

    async def run(self) -> StopReason:
        """Runs rounds until there is an answer, or a reason to end without one."""
        while self._record.rounds < self._settings.max_rounds:
            stop = await self._round()
            if stop is not None:
                return stop
            if self._token_budget.is_spent:
                return await self._end_at_limit("budget")
        return await self._end_at_limit("max_rounds")

    async def _round(self) -> StopReason | None:
        began = time.monotonic()
        await self._begin_round()
        if await self._toolset.add_new_tools():
            self._context.tools_size = _definitions_size(self._toolset)
            if self._output is not None:
                self._output.add_tools()
        reply = await self._get_reply()
        records: Sequence[ToolRecord] = ()
        if reply.calls and not reply.has_cut_call:
            records = await self._turns.run(reply)
            stop = self._turns.stop_reason
            if self._output is not None:
                self._output.allow_tools()
        else:
            stop = self._add_answer(reply)
        await self._end_round(reply, records, began)
        return stop

    async def _begin_round(self) -> None:
        self._record.begin_round()
        if self._channel.has_listener:
            await self._channel.put(RoundStarted(self._record.rounds, self._record.model))

    async def _end_round(self, reply: ModelReply, records: Sequence[ToolRecord], began: float) -> None:
        finished = self._log_round(reply, records, time.monotonic() - began)
        if self._channel.has_listener:
            await self._channel.put(RoundFinished(finished))

    async def _end_at_limit(self, stop: StopReason) -> StopReason:
        """Ends the run at a limit, after a last round without tools if the user wants an answer in any case."""
        if self._settings.on_limit == "raise":
            return stop
        self._may_call = False
        if self._output is not None:
            self._output.forbid_tools()
        self._history.add_nudge(_LIMIT_REACHED, _LAST_QUESTION)
        began = time.monotonic()
        await self._begin_round()
        reply = await self._ask_model()
        if reply.text.strip() and not reply.calls:
            self._record.has_last_words = self._read_output(reply)
            if reply.finish_reason == "length":
                self._warn("the last answer of the run was cut off at max_tokens")
            self._history.add_answer(reply.text, reasoning=reply.reasoning_fields)
        await self._end_round(reply, (), began)
        return stop

    def _read_output(self, reply: ModelReply) -> bool:
        """Reads the output from the last answer, and returns False if it is not valid."""
        if self._output is not None:
            try:
                self._record.output = self._output.read(reply.text)
            except InvalidAnswerError as error:
                logger.info("the last answer of the run is not its output: %s", error)
                return False
        self._warn_about_markup(reply)
        return True

    def _add_answer(self, reply: ModelReply) -> StopReason | None:
        """Adds an answer to the conversation. Returns the stop reason, or None if the output has to be requested.

        Raises:
            LLMValidationError: The model did not give a valid output.
        """
        output, text, reasoning = self._output, reply.text, reply.reasoning_fields
        if output is None or reply.finish_reason == "length":
            self._warn_about_markup(reply)
            self._history.add_answer(text, reasoning=reasoning)
            return "length" if reply.finish_reason == "length" else "stop"
        try:
            self._record.output = output.read(text)
        except InvalidAnswerError as error:
            request = output.next_request(error)
            self._history.add_answer(text, reasoning=reasoning, follow_up=request)
            if request is None:
                raise output.failed(error, text, self._record.model) from error
            return None
        self._history.add_answer(text, reasoning=reasoning)
        return "stop"

    def _warn_about_markup(self, reply: ModelReply) -> None:
        """Warns if the answer, or the reasoning of a reply without an answer, ends in a call that nothing has read."""
        markup = describe_markup(reply.text or reply.reasoning, self._toolset.names)
        if markup is None:
            return
        warning = f"{markup}; the server's tool parser or the chat template may not fit the model"
        self._warn(warning)

    def _warn(self, warning: str) -> None:
        if warning not in self._record.warnings:
            logger.warning("%s; run with model %r", warning, self._record.served_model or self._record.model)
            self._record.warnings.append(warning)

    def _log_round(self, reply: ModelReply, records: Sequence[ToolRecord], seconds: float) -> Round:
        record = self._record
        finished = Round(
            number=record.rounds,
            model=record.served_model or record.model,
            text=record.text,
            reasoning=record.reasoning,
            finish_reason=reply.finish_reason,
            tool_calls=tuple(records),
            usage=record.round_usage,
            seconds=seconds,
            nudges=tuple(record.round_nudges),
        )
        record.log.append(finished)
        return finished

    # Asking the model

    async def _get_reply(self) -> ModelReply:
        """Returns the model's reply. If it is neither an answer nor a call, the model is asked again.

        An answer that stays empty is an error only before the first call: after tools, a model may have nothing to add.

        Raises:
            LLMResponseError: The last reply was unusable as well.
        """
        self._nudges.begin_round()
        while True:
            reply = await self._ask_model()
            flaw = find_flaw(reply, self._toolset)
            nudge = None
            if flaw is not None and not self._token_budget.is_spent:
                nudge = self._nudges.next(flaw, reply, max_tokens=self._context.max_tokens())
            if nudge is None:
                break
            if nudge.kind == "unreadable_call":
                # Even if the next reply is good, the user should know why each call costs another generation.
                self._warn_about_markup(reply)
            await self._send_nudge(nudge, reply)
        self._history.drop_nudges()
        if flaw == "missing_call" or (flaw in ("empty", "only_reasoning") and not self._record.calls):
            raise self._unusable(flaw, reply)
        if flaw == "promise":
            self._warn("the answer announces a tool call that was not made")
        return reply

    async def _send_nudge(self, nudge: Nudge, reply: ModelReply) -> None:
        logger.info("the model is asked again, because its reply has the flaw %r: %s", nudge.kind, nudge.message)
        self._record.round_nudges.append(nudge)
        self._history.add_nudge(text_or_placeholder(reply), nudge.message, reasoning=reply.reasoning_fields)
        if self._channel.has_listener:
            await self._channel.put(ModelNudged(nudge))

    def _unusable(self, flaw: NudgeKind, reply: ModelReply) -> LLMResponseError:
        if flaw == "missing_call":
            problem = f"returned a reply with the finish reason {reply.finish_reason!r}, but without a tool call"
        else:
            problem = "returned an empty answer"
        return LLMResponseError(
            f"the model {problem}{' twice' if self._nudges.has_given(flaw) else ''}",
            hint=_MISSING_CALL_HINT if flaw == "missing_call" else _EMPTY_ANSWER_HINT,
            context={"operation": "agent run", "model": self._record.model},
        )

    async def _ask_model(self) -> ModelReply:
        if self._gate.is_closed:
            await self._gate.wait()
        self._context.trim()
        has_made_room = False
        first_place = self._history.image_place
        refusals: list[LLMResponseError | LLMStreamError] = []
        while True:
            try:
                reply = await self._generate()
            except ContextLengthExceededError as error:
                if has_made_room or not self._context.make_room(error):
                    raise
                has_made_room = True
                logger.info("the prompt was too long for the model's context; it is trimmed and sent again")
            except (LLMResponseError, LLMStreamError) as error:
                if self._add_demanded_reasoning(error):
                    continue
                if not self._move_refused_images(error):
                    raise
                refusals.append(error)
            else:
                self._learn_image_place(first_place, refusals)
                return reply

    def _add_demanded_reasoning(self, error: LLMResponseError | LLMStreamError) -> bool:
        """Adds the reasoning to the messages if the server demands it, and returns whether they have changed."""
        field = demanded_field(error)
        if self._settings.send_reasoning is False or field is None or not self._history.send_reasoning(field):
            return False
        self._source.demanded_reasoning_fields[self._record.model] = field
        logger.info("the server demands the model's reasoning; the messages are sent again with it")
        return True

    def _move_refused_images(self, error: LLMResponseError | LLMStreamError) -> bool:
        """Moves the images of the last results if the server has refused them. Returns whether they were moved."""
        place = next_place(self._history.image_place, error) if self._history.ends_with_images else None
        if place is None or self._record.text:
            return False
        consequence = (
            "the model reads that it cannot see them" if place == "none" else "they are sent in the tool message"
        )
        logger.info("the server refused the images of a result (%s); %s", error, consequence)
        self._history.move_images(place)
        return True

    def _learn_image_place(self, place: ImagePlace, refusals: Sequence[LLMResponseError | LLMStreamError]) -> None:
        """Remembers for later runs where the server takes images, if it has refused the first ones of this run.

        If it has taken others before, it may only limit their number.

        Args:
            place: The place in which the images were sent first.
            refusals: The errors after which they were sent elsewhere.
        """
        learned = place_after(place, refusals)
        if learned != place and not self._has_shown_images:
            self._source.image_places[self._record.model] = learned
        self._has_shown_images |= self._history.ends_with_images

    async def _generate(self) -> ModelReply:
        """Requests one generation. A client is leased for its duration only."""
        record, prompt_size = self._record, self._context.prompt_size
        params: dict[str, Any] = {
            "max_tokens": self._context.max_tokens(),
            "stream_options": {"include_usage": True},
        }
        response_format = None if self._output is None else self._output.response_format
        if response_format is not None:
            params["response_format"] = response_format
        elif self._toolset.definitions and self._may_call:
            params["tools"] = self._toolset.definitions
        params |= sampling_params(
            self._settings.sampling, has_tools="tools" in params, is_first_round=self._record.rounds <= 1
        )
        record.begin_reply()
        mode = self._settings.read_text_calls
        may_hold = mode != "never" and not self._channel.is_muted and allows_calls(params)
        self._held_text = HeldText(self._toolset.resolve_name, is_whole=mode == "whole") if may_hold else None
        async with self._source.lease(record.model) as client:
            stream = await client.chat_completion(self._history.to_send(), model=record.model, stream=True, **params)
            reply = await self._read_stream(stream)
        reply.max_tokens, reply.has_stop_texts = params["max_tokens"], "stop" in params
        self._check_complete(reply)
        if self._output is not None and reply.is_only_reasoning and not reply.calls:
            reply.text = answer_in_reasoning(reply.reasoning)
        self._count_tokens(reply, prompt_size)
        reply.may_call = allows_calls(params)
        has_read = not reply.calls and reply.may_call and await self._read_text_calls(reply)
        await self._send_held_text(reply.text if has_read else None)
        record.end_reply(reply.text, reply.reasoning)
        return reply

    async def _read_text_calls(self, reply: ModelReply) -> bool:
        """Takes the calls out of a reply that the model has written as text. Returns whether there were any."""
        settings = self._settings
        size = len(reply.text) + len(reply.reasoning)
        if settings.read_text_calls == "never" or not may_have_calls(reply.text or reply.reasoning):
            return False
        find = partial(
            self._toolset.find_text_calls,
            reply.text,
            reasoning=reply.reasoning,
            mode=settings.read_text_calls,
            repairs=settings.repair_calls,
            may_be_cut=reply.may_be_cut,
        )
        found = find() if size <= _LARGE_TEXT else await asyncio.to_thread(find)
        if found is not None:
            logger.info("the model wrote its tool calls as text, and they are read from there")
            reply.text, reply.calls = found
        return found is not None

    def _check_complete(self, reply: ModelReply) -> None:
        """Checks that the server has not aborted the answer.

        Raises:
            LLMResponseError: The finish reason says that the answer was aborted.
        """
        if reply.finish_reason in _BROKEN_FINISH_REASONS:
            raise LLMResponseError(
                f"the server aborted the answer, with the finish reason {reply.finish_reason!r}",
                hint="check the server's log; what had arrived is in .partial",
                context={"operation": "agent run", "model": self._record.model},
            )

    async def _read_stream(self, stream: ChunkStream) -> ModelReply:
        """Reads a stream to its end. Any exception closes the stream, so that the server stops generating."""
        # A stream of lmbridge's own client accumulates its chunks. Those of another client are accumulated here.
        accumulator = ChatAccumulator()
        own = stream if isinstance(stream, ReplyStream) else None
        arrived = accumulator if own is None else own

        def reply_so_far() -> Any:
            if own is not None:
                return own.partial
            return accumulator.reply() if accumulator.has_begun else None

        self._record.attach_stream(reply_so_far)
        splitter = None if self._channel.is_muted else ReasoningSplitter()
        halves: Halves = {}
        served_model: str | None = None
        try:
            async for chunk in stream:
                if own is None:
                    chunk = join_halves(accumulator.add(chunk), halves)  # noqa: PLW2901 - the chunk in its guaranteed form
                # Proxies name themselves while they load a model, so a name counts only once there is some answer.
                name = chunk.get("model")
                if name != served_model and isinstance(name, str) and arrived.has_answer:
                    may_change = own is not None and own.ignores_model_names
                    self._check_served_model(name, begins_reply=served_model is None, may_change=may_change)
                    served_model = name
                if splitter is not None:
                    await self._send_deltas(splitter.feed(chunk))
        except BaseException:
            # The caller no longer reads the stream, so the server should stop generating now.
            await stream.aclose()
            raise
        if splitter is not None:
            if (rest := rest_of_halves(halves)) is not None:
                await self._send_deltas(splitter.feed(rest))
            await self._send_deltas(splitter.close())
        return ModelReply.from_completion(reply_so_far() or {})

    async def _send_deltas(self, pieces: Sequence[Piece]) -> None:
        if self._channel.has_listener:
            for piece in pieces:
                if piece.kind == "reasoning":
                    await self._channel.put(ReasoningDelta(piece.text))
                elif text := self._held_text.feed(piece.text) if self._held_text is not None else piece.text:
                    await self._channel.put(TextDelta(text))

    async def _send_held_text(self, text_before_calls: str | None) -> None:
        """Sends the text that was held because it could be a call.

        Args:
            text_before_calls: The text before the calls that the reply had in its text; None if it had none.
        """
        held, self._held_text = self._held_text, None
        if held is not None and self._channel.has_listener and (text := held.rest(text_before_calls)):
            await self._channel.put(TextDelta(text))

    def _check_served_model(self, name: str | None, *, begins_reply: bool, may_change: bool) -> None:
        """Compares the model that a reply names with the model of the previous rounds, unless it may change.

        Raises:
            ModelChangedDuringExecutionError: The reply names another model.
        """
        first = self._record.served_model
        if not name or first is None:
            self._record.served_model = name or first
        elif not (may_change or is_same_model(first, name) or is_same_model(name, first)):
            if begins_reply:
                # Nothing of this reply was written by the model of the run.
                self._record.begin_reply()
            raise ModelChangedDuringExecutionError(
                f"the run began with model {first!r} and went on with {name!r}",
                first,
                name,
                hint="the server swapped models between two rounds; pass a model name; see Limits.max_loaded_models",
                context={"operation": "agent run", "model": self._record.model},
            )

    def _count_tokens(self, reply: ModelReply, prompt_size: int) -> None:
        """Adds the tokens of a reply, or an estimate if the server did not count them."""
        usage = reply.usage or {}
        if reply.usage:
            self._record.add_usage(reply.usage)
        estimated = self._context.tokens_of(prompt_size) + len(reply.text + reply.reasoning) // 3
        self._token_budget.spend(usage.get("total_tokens") or estimated)
        self._context.learn(prompt_size, usage.get("prompt_tokens"))


def _definitions_size(toolset: Toolset) -> int:
    """Returns how many bytes the definitions of the tools take in a request."""
    return len(msgspec.json.encode(toolset.definitions)) if toolset.definitions else 0
