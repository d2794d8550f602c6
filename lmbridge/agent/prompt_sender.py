"""`PromptSender`: sends the conversation of a run, and changes it if it is too long or the server refuses part of it.

A run continues with what its server accepts, and does not end with the first refusal. Each change loses nothing, or as
little as possible: older messages are shortened or left out, images are moved to another message, reasoning is added,
or the constraint of a retry is dropped. The `ClientSource` remembers what a server has refused, so that later runs do
not ask for it again.

`history` ensures that a prompt only grows at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.compaction import Compactor
from lmbridge.agent.constrained_retry import ConstrainedRetry
from lmbridge.agent.generation_runner import GenerationRunner
from lmbridge.agent.journal_interface import RecordedReply, RunJournal
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.pause import PauseGate
from lmbridge.agent.reasoning_replay import demanded_field
from lmbridge.agent.result_images import ImagePlace, next_place, place_after
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.settings import Settings
from lmbridge.agent.tokens import ContextBudget
from lmbridge.agent.toolset import Toolset
from lmbridge.errors import ContextLengthExceededError, LLMResponseError, LLMStreamError

logger: logging.Logger = logging.getLogger("lmbridge.agent")


class PromptSender:
    """Sends the prompts of one run.

    Args:
        source: Remembers for later runs what the server refuses.
        settings: The options of the run.
        toolset: The tools of the run.
        record: Everything that the run has done.
        context: The room that the conversation has in the model's context.
        compactor: Makes room in the context.
        retry: Decides whether a request is constrained to the schema of a tool.
        generations: Requests each generation.
        gate: Holds the run before each generation while the run is paused.
        journal: Keeps each reply, and replays those from before an interruption. None if the run has no journal.
    """

    def __init__(
        self,
        *,
        source: ClientSource,
        settings: Settings,
        toolset: Toolset,
        record: RunRecord,
        context: ContextBudget,
        compactor: Compactor,
        retry: ConstrainedRetry,
        generations: GenerationRunner,
        gate: PauseGate,
        journal: RunJournal | None,
    ) -> None:
        self._source = source
        self._settings = settings
        self._toolset = toolset
        self._record = record
        self._history = record.history
        self._context = context
        self._compactor = compactor
        self._retry = retry
        self._generations = generations
        self._gate = gate
        self._journal = journal
        self._has_shown_images = False
        record.history.image_place = source.image_places.get(record.model, "user")
        field = source.demanded_reasoning_fields.get(record.model)
        if settings.send_reasoning is True or (settings.send_reasoning == "auto" and field is not None):
            record.history.send_reasoning(field)

    async def send(self) -> ModelReply:
        """Sends the conversation, and returns the model's reply. While the run is paused, nothing is sent.

        Raises:
            ContextLengthExceededError: The conversation does not fit into the context, and cannot be made to fit.
            LLMError: The request failed for a reason that no change of the messages can remove.
        """
        if self._gate.is_closed:
            await self._gate.wait()
        if self._context.needs_exact_count:
            await self._count_prompt()
        await self._compactor.fit()
        if self._gate.is_closed:
            await self._gate.wait()
        prompt = self._context.compared(self._context.prompt_size)
        is_strict = self._settings.context_overflow == "raise"
        # A warning must not be wrong, so there is none if the estimate exceeds the context only a little. If the server
        # then cuts the prompt, its own count shows that after the reply.
        if prompt is not None and (prompt.is_too_long if is_strict else prompt.is_clearly_too_long):
            self._generations.report_overflow(prompt.describe(), prompt)
        has_made_room = False
        first_place = self._history.image_place
        refusals: list[LLMResponseError | LLMStreamError] = []
        while True:
            try:
                reply = await self._usable_reply()
            except ContextLengthExceededError as error:
                if has_made_room or not await self._compactor.make_room(error):
                    raise
                has_made_room = True
                logger.info("the prompt was too long for the model's context; a smaller one is sent")
            except (LLMResponseError, LLMStreamError) as error:
                if self._add_demanded_reasoning(error) or self._retry.is_refused(error):
                    continue
                if not self._move_refused_images(error):
                    raise
                refusals.append(error)
                # A note in place of the images may have made the prompt longer.
                await self._compactor.fit()
            else:
                self._learn_image_place(first_place, refusals)
                return reply

    async def _count_prompt(self) -> None:
        """Asks the server how many tokens the next prompt has, because messages may have to be left out."""
        tools = self._toolset.definitions if self._generations.may_call else None
        size = self._context.prompt_size
        tokens = await self._source.count_tokens(self._record.model, self._history.to_send(), tools)
        self._context.learn(size, tokens)

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
        """Remembers for later runs where the server accepts images, if it has refused the first ones of this run.

        If it has accepted earlier images of this run, the refusal may only mean that there are too many of them.

        Args:
            place: The place in which the images were sent first.
            refusals: The errors, in order. After each of them, the images were sent in another place.
        """
        learned = place_after(place, refusals)
        if learned != place and not self._has_shown_images:
            self._source.image_places[self._record.model] = learned
        self._has_shown_images |= self._history.ends_with_images

    async def _usable_reply(self) -> ModelReply:
        """Returns the next reply. If a constrained reply is unusable, the model is asked again without constraint."""
        reply = await self._next_reply()
        if self._retry.is_unusable(reply):
            self._retry.give_up(reply)
            reply = await self._next_reply()
        self._retry.end_reply(self._record.model)
        return reply

    async def _next_reply(self) -> ModelReply:
        """Returns the next reply: the one that the journal has from before an interruption, or a new one."""
        if self._journal is None:
            return await self._generations.run()
        while (recorded := self._journal.next_reply(self._record.rounds)) is not None:
            self._replay(recorded)
            if not recorded.is_dropped:
                return recorded.reply
        reply = await self._generations.run()
        record = RecordedReply(
            round=self._record.rounds,
            reply=reply,
            served_model=self._record.served_model,
            image_place=self._history.image_place,
        )
        await self._journal.add_reply(record)
        return reply

    def _replay(self, recorded: RecordedReply) -> None:
        """Records a reply from before an interruption as if it had just arrived."""
        record, reply = self._record, recorded.reply
        record.served_model = recorded.served_model
        if recorded.image_place != self._history.image_place:
            self._history.move_images(recorded.image_place)
        self._generations.add_tokens(reply, self._context.prompt_size)
        record.end_reply(reply.text, reply.reasoning)
