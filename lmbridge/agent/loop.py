"""`RunLoop`: the rounds of a run, one method for each stage.

A round asks the model, reads its reply, makes the calls that are in it, and decides whether to go on. A graph of nodes,
as some agent frameworks have it, was considered and rejected: the order of the stages never changes, and plain methods
show it in a stack trace. The state behind the decisions is kept in other modules and tested separately: `history` has
the conversation, `tokens` the token counts, and `turn_runner` the calls, with the reasons to stop that follow from
them.

Three layers ask the model. The outermost one, this module, asks it again if its reply cannot be used, or is doubtful.
Below it, `prompt_sender` sends the prompt in another form if it is too long or the server refuses it. The innermost
one, `generation_runner`, requests a single generation and reads its stream.

The loop returns why a run ends. `RunHandle` in `runs` makes an error of it, such as `MaxRoundsExceededError`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import attrs
import msgspec

from lmbridge._tasks import pause_after
from lmbridge.agent.channel import Channel
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.compaction import Compactor
from lmbridge.agent.constrained_retry import ConstrainedRetry
from lmbridge.agent.events import ContextCompacted, ModelNudged, RoundFinished, RoundStarted, RunEvent
from lmbridge.agent.generation_runner import GenerationRunner
from lmbridge.agent.guards import TokenBudget
from lmbridge.agent.journal_interface import RunJournal
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.nudges import AFTER_CALLS, Nudges, find_flaw, request_answer, text_or_placeholder
from lmbridge.agent.pause import PauseGate
from lmbridge.agent.prompt_sender import PromptSender
from lmbridge.agent.result import CompactionStep, Nudge, NudgeKind, Round, StopReason, ToolRecord
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.settings import Settings
from lmbridge.agent.summary import Summarizer
from lmbridge.agent.text_calls.unread_calls import describe_markup, find_unread_call, first_json_call
from lmbridge.agent.thinking import THOUGHT_TOO_LONG, can_stop_thinking
from lmbridge.agent.tokens import ContextBudget
from lmbridge.agent.toolset import Toolset
from lmbridge.agent.turn_runner import TurnRunner
from lmbridge.agent.typed_output import OutputReader
from lmbridge.client.structured import InvalidAnswerError
from lmbridge.errors import LLMResponseError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_EMPTY_ANSWER_HINT: Final = "describe the task in more detail, offer fewer tools, or use another model"
_MISSING_CALL_HINT: Final = "check that the server's tool parser and the chat template fit the model"


class RunLoop:
    """The rounds of one run.

    Args:
        run_id: The id of the run, which its tools receive.
        source: Lends the client for each generation.
        settings: The options of the run.
        toolset: The tools of the run.
        context_length: The number of tokens in the model's context, the answer included; None if it is unknown.
        record: Everything that the run has done; the loop writes to it.
        channel: Carries the events of the run.
        is_stopping: Returns True if the run has been cancelled. Tools in threads poll it, because threads cannot be
            cancelled.
        gate: Holds the run before each generation and each call while the run is paused.
        journal: Keeps the steps of the run, and replays those from before an interruption. None if the run has none.
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
        journal: RunJournal | None = None,
    ) -> None:
        self._seconds = seconds = time.monotonic if journal is None else journal.seconds
        # When the run first asked its model, on the clock of the run: that of its journal, or the monotonic clock.
        self._began = began = seconds()
        self._reply_seconds = 0.0
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
        self._token_budget = TokenBudget(settings.max_total_tokens)
        self._retry = ConstrainedRetry(toolset, source, is_enabled=settings.constrain_retries)
        self._generations = GenerationRunner(
            source=source,
            settings=settings,
            toolset=toolset,
            record=record,
            channel=channel,
            context=self._context,
            token_budget=self._token_budget,
            retry=self._retry,
            output=self._output,
        )
        # The functions that are passed to the parts of the loop do not refer to the loop itself. Such a reference cycle
        # would keep the whole conversation in memory after the run, until the garbage collector runs.
        self._turns = TurnRunner(
            run_id,
            settings=settings,
            toolset=toolset,
            record=record,
            channel=channel,
            is_stopping=is_stopping,
            gate=gate,
            clock=lambda: seconds() - began,
            journal=journal,
        )
        compactor = Compactor(
            record.history,
            self._context,
            mode=settings.compaction,
            summarize=Summarizer(
                source=source,
                settings=settings,
                toolset=toolset,
                record=record,
                token_budget=self._token_budget,
                estimate=self._context.tokens_of,
                journal=journal,
            ),
            report=partial(_report_compaction, record, channel, self._turns),
        )
        self._prompts = PromptSender(
            source=source,
            settings=settings,
            toolset=toolset,
            record=record,
            context=self._context,
            compactor=compactor,
            retry=self._retry,
            generations=self._generations,
            gate=gate,
            journal=journal,
        )
        self._nudges = Nudges(toolset, settings.max_nudges, settings.read_text_calls != "never")

    async def run(self) -> StopReason:
        """Runs rounds until there is an answer, or a reason to end without one."""
        while self._record.rounds < self._settings.max_rounds:
            stop = await self._round()
            if stop == "repetition":
                return await self._end_at_limit(stop)
            if stop is not None:
                return stop
            if self._token_budget.is_spent:
                return await self._end_at_limit("budget")
        return await self._end_at_limit("max_rounds")

    async def _round(self) -> StopReason | None:
        began = self._seconds()
        await self._begin_round()
        if await self._toolset.add_new_tools():
            self._context.tools_size = _definitions_size(self._toolset)
            if self._output is not None:
                self._output.add_tools()
        reply = await self._get_reply()
        self._reply_seconds = self._seconds() - began
        records: Sequence[ToolRecord] = ()
        if reply.calls and not reply.has_cut_call:
            records = await self._turns.run(reply)
            self._generations.has_results = self._turns.has_results
            self._retry.note_calls(self._turns.wrong_tool, reply)
            stop = self._turns.stop_reason
            if self._output is not None:
                self._output.allow_tools()
        else:
            stop = self._add_answer(reply)
            if stop == "stop" and self._still_repeats(reply):
                stop = "repetition"
        await self._end_round(reply, records, began)
        return stop

    async def _begin_round(self) -> None:
        self._record.begin_round()
        if (watch := self._record.watch) is not None:
            watch.round_begun(self._record.rounds, self._record.model)
        if self._channel.has_listener:
            await self._channel.put(RoundStarted(self._record.rounds, self._record.model))

    async def _end_round(self, reply: ModelReply, records: Sequence[ToolRecord], began: float) -> None:
        finished = self._log_round(reply, records, began)
        if (watch := self._record.watch) is not None:
            watch.round_ended(finished.text)
        if self._channel.has_listener:
            await self._channel.put(RoundFinished(finished))

    async def _end_at_limit(self, stop: StopReason) -> StopReason:
        """Ends the run at a limit, after a last round without tools if the user wants an answer in any case."""
        if self._settings.on_limit == "answer" and (reply := await self._get_last_words()) is not None:
            self._record.has_last_words = True
            if reply.finish_reason == "length":
                self._record.warn("the last answer of the run was cut off at max_tokens")
        return stop

    async def _get_last_words(self) -> ModelReply | None:
        """Asks for an answer in a last round without tools. Returns None if the reply is not a valid answer.

        A text that ends in a call counts as an answer with a warning, because the program has asked for no exception.
        """
        self._generations.may_call = False
        if self._output is not None:
            self._output.forbid_tools()
        self._history.add_nudge(AFTER_CALLS, request_answer(self._history.task_text))
        began = self._seconds()
        await self._begin_round()
        reply = await self._prompts.send()
        self._reply_seconds = self._seconds() - began
        has_answer = bool(reply.text.strip() and not reply.calls)
        if has_answer:
            has_answer = self._read_output(reply)
            self._history.add_answer(reply.text, reasoning=reply.reasoning_fields)
        await self._end_round(reply, (), began)
        return reply if has_answer else None

    def _read_output(self, reply: ModelReply) -> bool:
        """Reads the output from the last answer, and returns False if the answer is not a valid output."""
        if self._output is not None:
            try:
                self._record.output = self._output.read(reply.text)
            except InvalidAnswerError as error:
                logger.info("the last answer of the run is not a valid output: %s", error)
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
        """Warns if the answer, or the reasoning of a reply without an answer, ends in a call that could not be read."""
        markup = describe_markup(reply.text or reply.reasoning, self._toolset.names)
        if markup is None:
            return
        warning = f"{markup}; the server's tool parser or the chat template may not fit the model"
        self._record.warn(warning)

    def _log_round(self, reply: ModelReply, records: Sequence[ToolRecord], began: float) -> Round:
        record = self._record
        last_reply = record.last_reply
        finished = Round(
            number=record.rounds,
            model=record.served_model or record.model,
            text=last_reply.text,
            reasoning=last_reply.reasoning,
            finish_reason=reply.finish_reason,
            tool_calls=tuple(records),
            usage=record.round_usage,
            seconds=self._seconds() - began,
            started=began - self._began,
            reply_seconds=self._reply_seconds,
            nudges=tuple(record.round_nudges),
            compactions=tuple(record.round_compactions),
        )
        record.log.append(finished)
        return finished

    # Asking the model

    async def _get_reply(self) -> ModelReply:
        """Returns the model's reply. If it is flawed or doubtful (see `nudges`), the model is asked again.

        An answer that stays empty is an error only before the first call: after tools, a model may have nothing to add.

        Raises:
            LLMResponseError: The reply is still unusable after the last nudge.
        """
        self._nudges.begin_round()
        first_answer: ModelReply | None = None
        while True:
            reply = await self._prompts.send()
            self._generations.stops_thinking, self._generations.may_call = False, True
            flaw = find_flaw(reply, self._toolset) or await self._find_doubt(reply)
            await pause_after(len(reply.text) + len(reply.reasoning))
            nudge = None
            if flaw is not None and not self._token_budget.is_spent:
                nudge = self._nudges.next(
                    flaw,
                    reply,
                    task=self._history.task_text,
                    max_tokens=reply.max_tokens or self._context.max_tokens(),
                    has_results=self._turns.has_results,
                    is_repetition=flaw == "repeated_call" or self._repeats_call(reply),
                )
            if nudge is not None and nudge.kind in THOUGHT_TOO_LONG:
                stops = can_stop_thinking(self._source.server_kinds.get(self._record.model))
                nudge = attrs.evolve(nudge, without_thinking=stops)
            if nudge is None:
                break
            if nudge.kind == "unreadable_call":
                # Even if the next reply is good, the user should know why each call costs another generation.
                self._warn_about_markup(reply)
            if flaw == "no_call":
                first_answer = reply
            await self._send_nudge(nudge, reply)
        self._history.drop_nudges()
        if first_answer is not None and not reply.calls:
            # The model has no call to make, so its first answer is used: the last one may be about the nudge.
            self._record.end_reply(first_answer.text, first_answer.reasoning)
            return first_answer
        if flaw == "missing_call" or (flaw in ("empty", "only_reasoning") and not self._record.calls):
            raise self._unusable(flaw, reply)
        if flaw == "promise":
            self._record.warn("the answer announces a tool call that was not made")
        return reply

    async def _find_doubt(self, reply: ModelReply) -> NudgeKind | None:
        """Returns why a model is asked again although its reply is well-formed; None if the reply is used.

        A call that the server has recognized may be repeated on purpose, for example because a tool is polled. So the
        model only gets a warning with the result, until `repetition_limit` ends the run.
        """
        if not reply.may_call:
            return None
        if reply.calls:
            if self._allows_repetitions() or not reply.written_calls:
                return None
            # A model has lost its way if it fills its reply with calls, and the result of the first one is known.
            has_lost_its_way = reply.finish_reason == "length" and self._repeats_call(reply)
            is_repeated = has_lost_its_way or await self._turns.repeats_last_calls(reply.calls)
            return "repeated_call" if is_repeated else None
        if not reply.is_of_text_caller or self._record.round_nudges or self._history.has_calls:
            return None
        return "no_call" if reply.finish_reason != "length" else None

    def _still_repeats(self, reply: ModelReply) -> bool:
        """Returns whether the model was asked to answer instead of repeating a call, and has written a call again."""
        is_asked = self._nudges.has_given("repeated_call")
        return is_asked and find_unread_call(reply.text or reply.reasoning, self._toolset.names) is not None

    def _allows_repetitions(self) -> bool:
        """Returns whether the program has a use for repeated calls, such as those of a tool that rolls a die."""
        return self._settings.repetition_limit is None or not self._settings.deduplicate_calls

    def _repeats_call(self, reply: ModelReply) -> bool:
        """Returns whether a reply begins with a call, written as text, whose result the model already has.

        It is False if the program allows repetitions: then the model may want the call again.
        """
        if self._allows_repetitions():
            return False
        call = first_json_call(reply.written_calls or reply.text)
        return call is not None and self._turns.has_result_of(call.name, call.arguments)

    async def _send_nudge(self, nudge: Nudge, reply: ModelReply) -> None:
        self._generations.stops_thinking = nudge.without_thinking
        how = " without thinking" if nudge.without_thinking else ""
        if nudge.without_tools:
            self._generations.may_call = False
            how += " without tools"
            # Replies full of calls would be examples that the model follows. Dropping them costs no cached tokens,
            # because without the definitions of the tools, the prompt is a new one in any case.
            self._history.drop_nudges()
        logger.info("the model is asked again%s, because its reply has the flaw %r: %s", how, nudge.kind, nudge.message)
        self._record.round_nudges.append(nudge)
        reply_text = AFTER_CALLS if nudge.without_tools else text_or_placeholder(reply)
        self._history.add_nudge(reply_text, nudge.message, reasoning=reply.reasoning_fields)
        if self._channel.has_listener:
            await self._channel.put(ModelNudged(nudge))

    def _unusable(self, flaw: NudgeKind, reply: ModelReply) -> LLMResponseError:
        if flaw == "missing_call":
            problem = f"returned a reply with the finish reason {reply.finish_reason!r}, but without a tool call"
        else:
            problem = "returned an empty answer"
        return LLMResponseError(
            f"the model {'twice ' if self._nudges.has_given(flaw) else ''}{problem}",
            hint=_MISSING_CALL_HINT if flaw == "missing_call" else _EMPTY_ANSWER_HINT,
            context={"operation": "agent run", "model": self._record.model},
        )


async def _report_compaction(
    record: RunRecord, channel: Channel[RunEvent], turns: TurnRunner, step: CompactionStep
) -> None:
    record.round_compactions.append(step)
    turns.forgive_repetitions()
    if channel.has_listener:
        await channel.put(ContextCompacted(step))


def _definitions_size(toolset: Toolset) -> int:
    """Returns how many bytes the definitions of the tools take in a request."""
    return len(msgspec.json.encode(toolset.definitions)) if toolset.definitions else 0
