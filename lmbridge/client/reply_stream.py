"""`ReplyStream`: the base class of the streams of all endpoints.

A stream is an instance of a class, and not an `async def` function with a `yield` in it, for three reasons:

- A stop button has to close a stream from another task. With a generator, that raises "asynchronous generator is
  already running".
- A generator that is dropped is closed by the event loop at some later time, in a task that is never awaited, while the
  server goes on generating.
- A generator has no way to return the reply so far.

What happens to the connection of a stream that is dropped unclosed, and after `[DONE]`, is decided by `EventStream` in
`lmbridge.transport.events`.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar, cast

from lmbridge._closable_stream import ClosableStream
from lmbridge._tasks import SIZE_PER_STEP, run_at_once
from lmbridge.client import failures
from lmbridge.client.accumulator import Accumulator
from lmbridge.client.error_body import Redact, parse_error_body
from lmbridge.client.json_codec import decode_json
from lmbridge.client.served_model import MismatchPolicy, are_different_models
from lmbridge.client.surrogates import Halves, rest_of_halves
from lmbridge.client.usage import StreamUsage
from lmbridge.errors import (
    LLMError,
    LLMStreamError,
    LLMTimeoutError,
    ModelChangedDuringExecutionError,
    ModelNotFoundError,
    TaskCancelledError,
)
from lmbridge.transport import Event, EventStream, NamedEvent
from lmbridge.transport.events import DRAIN_SECONDS

logger: logging.Logger = logging.getLogger("lmbridge.client")

_DONE: Final = b"[DONE]"
_GRACE_AFTER_TEXT: Final = 2.0
"""The most seconds to wait for the end of the body after a finish reason that arrived together with text.

Some servers put a finish reason into every chunk, and a slow model may need this long for the next one.
"""
_NO_EVENTS: Final[Iterator[Event]] = iter(())
_DAMAGED_LINE: Final = "a line of the stream is damaged, so that a part of the answer may be missing"
_DAMAGED_LINE_HINT: Final = (
    "the server, or a proxy in front of it, sends malformed events; .partial has the rest of the answer"
)
_READER_CANCELLED: Final = "the stream was closed: its reader was cancelled"

_Item = TypeVar("_Item")
_Reply_co = TypeVar("_Reply_co", covariant=True)


class ReplyStream(ClosableStream[_Item], Generic[_Item, _Reply_co]):
    """The base class of the streams of all endpoints: an async generator of the pieces of one reply.

    Iterate it once, from one task at a time. It is also an async context manager. Leaving it early, in any way, closes
    the connection, so that the server stops generating, and frees its slot.

    A subclass defines `_read_object`, which turns the JSON object of an event into an item of the iteration.

    Args:
        events: The events of the reply, as the transport reads them.
        mismatch_policy: What happens if the model that answers is not the one that was asked for.
        redact: Removes the secrets of the client from a text.
        accumulator: Merges the events into the reply so far.
    """

    _instead_of_a_copy = "copy the chunks that it yields, or what collect() returns"

    __slots__ = (
        "_accumulator",
        "_add",
        "_events",
        "_failure",
        "_halves",
        "_has_ended",
        "_is_complete",
        "_mismatch_policy",
        "_named_model",
        "_pending",
        "_redact",
        "_reply_id",
        "_served_model",
        "_unfinished_event",
    )

    _EXPECTED_END: str = "[DONE] or a finish reason"
    """The proper end of such a stream, which the error for a stream that was cut off mentions."""

    def __init__(
        self,
        events: EventStream,
        mismatch_policy: MismatchPolicy,
        redact: Redact,
        accumulator: Accumulator[_Reply_co],
    ) -> None:
        self._events = events
        self._mismatch_policy = mismatch_policy
        self._redact = redact
        self._accumulator = accumulator
        # The bound method is stored because it is called once for each chunk.
        self._add = accumulator.add
        # Events that have arrived but are not yet decoded. They are decoded when they are handed out, because hundreds
        # of decoded chunks at a time would keep the garbage collector busy.
        self._pending: Iterator[Event] = _NO_EVENTS
        # This must not be a method of the stream: the call would then keep the stream alive, and dropping the stream
        # would no longer close its connection.
        events.call.read_usage = StreamUsage(accumulator)
        # The model that the events have named last, and the id of the reply in these events.
        self._named_model: str | None = None
        self._reply_id: object = None
        # The named model, once it has been compared with the one that was asked for.
        self._served_model: str | None = None
        # The halves of characters that have been held back until their other halves arrive.
        self._halves: Halves = {}
        # The rest of the work on a large event, which is done in slices between which other tasks run.
        self._unfinished_event: Generator[None, None, _Item | None] | None = None
        self._is_complete = False
        # Whether the iteration has ended properly, so that nothing is left to be read or checked.
        self._has_ended = False
        self._failure: LLMError | None = None

    @property
    def partial(self) -> _Reply_co | None:
        """What `collect` would return for the stream so far, as a new dict, or None before the first chunk."""
        return self._accumulator.reply() if self._accumulator.has_begun else None

    @property
    def has_answer(self) -> bool:
        """Whether a piece of the answer has been read that is more than reasoning."""
        return self._accumulator.has_answer

    @property
    def ignores_model_names(self) -> bool:
        """Whether any model may answer, because `model_mismatch` is "ignore"."""
        return self._mismatch_policy.ignores_names

    @property
    def status(self) -> int:
        """The HTTP status code of the response."""
        return self._events.status

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the response. Their names are case-insensitive."""
        return self._events.headers

    def __repr__(self) -> str:
        state = "failed" if self._failure else "ended" if self._events.closed else "open"
        return f"<{type(self).__name__} model={self._served_model!r} {state}>"

    async def __anext__(self) -> _Item:
        try:
            while True:
                # `_pending` is an iterator, so the loop continues after the event for which the last call returned.
                for event in self._pending:
                    item = await self._read_large_event(event) if is_large(event) else self._read_event(event)
                    if item is not None:
                        return item
                await self._receive()
        except (LLMError, StopAsyncIteration) as ending:
            return await self._last_item(ending)

    async def aclose(self) -> None:
        """Closes the stream; may be called from any task, and more than once.

        Before the end of the reply this closes the connection. A task that reads the stream, now or later, then gets
        `TaskCancelledError` and never a silent end.
        """
        if self._is_complete:
            await self._events.drain()
        elif self._failure is None:
            self._break_off(TaskCancelledError("the stream was closed before its end"))

    async def collect(self) -> _Reply_co:
        """Reads the stream to its end, and returns the dict that the plain call would have returned.

        The dict includes what was read before.

        Raises:
            LLMError: The same errors as the iteration.
        """
        return await self._read_to_end()

    # Reading

    @abstractmethod
    def _read_object(self, value: dict[str, Any], name: str, data: bytes) -> _Item | None:
        """Returns the item for the JSON object of an event, or None if the iteration skips the event.

        Args:
            value: The object.
            name: The name of the event, or "".
            data: The text that the object was decoded from.

        Raises:
            LLMError: The object reports an error, or does not belong to this reply.
        """

    async def _receive(self) -> None:
        """Waits for more events.

        Raises:
            StopAsyncIteration: The reply is complete.
            LLMError: The stream has failed.
        """
        if self._failure is not None:
            raise self._failure
        if not self._is_complete and self._events.ended:
            self._end_of_body()
        if self._is_complete:
            await self._events.drain()
            try:
                await self._check_whole_reply()
            except LLMError as error:
                self._fail(error)
                raise
            self._has_ended = True
            raise StopAsyncIteration
        if self._accumulator.is_finished:
            self._events.expect_end(_GRACE_AFTER_TEXT if self._accumulator.ends_with_text else DRAIN_SECONDS)
        else:
            self._events.expect_more()
        try:
            events = await self._events.read()
        except (LLMStreamError, LLMTimeoutError) as error:
            if not self._accumulator.is_finished:
                self._fail(error)
                raise
            self._mark_complete()
            self._log_missing_end(error)
            return
        except LLMError as error:
            self._fail(error)
            raise
        except asyncio.CancelledError:
            self._break_off(TaskCancelledError(_READER_CANCELLED))
            raise
        if self._failure is not None:
            # Another task has closed the stream, while these events were arriving.
            self._add_to_partial(self._failure, events)
            raise self._failure
        self._pending = iter(events)

    async def _check_whole_reply(self) -> None:
        """Checks the whole reply when it has arrived. If the check is cancelled, the next read repeats it.

        Raises:
            LLMError: The check shows that the reply is not a valid answer.
        """

    def _log_missing_end(self, error: LLMError) -> None:
        """Logs that neither `[DONE]` nor the end of the body followed the finish reason."""
        if self._accumulator.ends_with_text and not self._accumulator.usage:
            logger.warning(
                "an answer may be incomplete, because neither [DONE] nor the end of the body followed its finish"
                " reason, which arrived together with text: %s",
                error,
            )
        else:
            logger.debug("the reply is complete, but the body did not end after its finish reason: %s", error)

    async def _last_item(self, ending: LLMError | StopAsyncIteration) -> _Item:
        """Returns the piece that the stream still holds back when it ends.

        If the stream holds nothing back, this raises the exception that has ended it. Otherwise the next call of
        `__anext__` raises the exception.
        """
        may_go_on = isinstance(ending, StopAsyncIteration) or (
            ending is self._failure and not isinstance(ending, TaskCancelledError)
        )
        if self._halves and may_go_on and (rest := rest_of_halves(self._halves)) is not None:
            return self._make_last_item(rest)
        if isinstance(ending, ModelNotFoundError):
            await self._complete_error(ending)
        try:
            raise ending
        finally:
            # The traceback of the exception refers to this frame. If the frame referred to the exception as well, only
            # the garbage collector could free them, and the whole stream with them.
            del ending

    def _make_last_item(self, rest: dict[str, Any]) -> _Item:
        """Returns the item for the last piece of a stream, which was held back and belongs to no event."""
        raise NotImplementedError

    async def _complete_error(self, error: LLMError) -> None:
        """Adds what another request finds out to an error of this stream. Later calls do nothing."""
        request = self._events.call.request
        complete_error, request.complete_error = request.complete_error, None
        if complete_error is not None:
            await complete_error(error)

    async def _read_large_event(self, event: Event) -> _Item | None:
        """Does what `_read_event` does for a large event, and lets other tasks run between the slices of the work.

        If the stream is closed in the meantime, or the caller is cancelled, the event is not handed out any more. The
        rest of the event is added to the reply all the same, so that `.partial` has everything that has arrived.
        """
        if (decoded := self._decode_event(event)) is None:
            return None
        slices = self._unfinished_event = self._object_in_slices(*decoded)
        try:
            while True:
                next(slices)
                await asyncio.sleep(0)
                if self._failure is not None:
                    # Another task has closed the stream.
                    raise self._failure
        except StopIteration as end:
            self._unfinished_event = None
            return cast("_Item | None", end.value)
        except asyncio.CancelledError:
            self._break_off(TaskCancelledError(_READER_CANCELLED))
            raise

    def _object_in_slices(self, value: dict[str, Any], name: str, data: bytes) -> Generator[None, None, _Item | None]:
        """Does what `_read_object` does, as a generator that yields whenever other tasks should run.

        It yields before it does anything, because decoding a large event has taken some time already.
        """
        yield
        return self._read_object(value, name, data)

    def _read_event(self, event: Event) -> _Item | None:
        """Returns the item for an event, or None for `[DONE]` and for events that the iteration skips.

        Raises:
            LLMError: The event reports an error, or is not JSON.
        """
        decoded = self._decode_event(event)
        return None if decoded is None else self._read_object(*decoded)

    def _decode_event(self, event: Event) -> tuple[dict[str, Any], str, bytes] | None:
        """Returns the object of an event, its name and its text; or None for `[DONE]` and for events to be skipped.

        Raises:
            LLMError: The event reports an error, or is not JSON.
        """
        name, data = (event.name, event.data) if isinstance(event, NamedEvent) else ("", event)
        data = data.strip()
        if data == _DONE:
            self._on_done()
            return None
        if not data and name != "error":
            return None
        try:
            value = decode_json(data)
        except ValueError:
            text = data.decode("utf-8", "replace")
            is_broken_json = name != "error" and text.startswith(("{", "["))
            if is_broken_json and self._events.ended:
                # The end of the body cut this event off. `_end_of_body` raises the error that says so.
                return None
            raise self._server_error(text, is_broken_json=is_broken_json) from None
        if value == "[DONE]":
            self._on_done()
            return None
        if name != "error" and _says_nothing(value):
            return None
        if not isinstance(value, dict) or name == "error":
            raise self._server_error(data.decode("utf-8", "replace"))
        return value, name, data

    def _add_from_model(self, value: dict[str, Any], model: object, reply_id: object) -> Mapping[str, Any]:
        """Adds an event to the reply, and returns the event for the caller.

        Args:
            value: The event.
            model: The model that it names. Anything but a non-empty string counts as no name.
            reply_id: The id of the reply that it names.

        Raises:
            ModelMismatchError: The model is not the one that was asked for, and `model_mismatch` is "raise".
            ModelChangedDuringExecutionError: Another model continues the answer, and `model_mismatch` is not "ignore".
            LLMError: The event reports an error, or its shape is unknown.
        """
        if model is not None and model == self._served_model:
            # The model has been compared already, so there is nothing to check, and nothing to keep.
            return self._add(value)
        self._check_model(model, reply_id)
        added = self._add(value)
        self._note_model(model, reply_id)
        return added

    def _check_model(self, model: object, reply_id: object) -> None:
        """Compares the model that an event names with the one that earlier events named, before the event is added.

        The two are compared only once there is an answer. Until then, a name means little: some proxies announce that
        they are loading a model, in events that name the proxy as the model.

        Raises:
            ModelChangedDuringExecutionError: Another model continues the answer, and `model_mismatch` is not "ignore".
        """
        if isinstance(model, str) and model and model != self._served_model:
            self._check_same_model(model, reply_id)

    def _note_model(self, model: object, reply_id: object) -> None:
        """Keeps the model that an event names, after the event was added.

        As soon as there is any delta, the model is compared with the one that was asked for.

        Raises:
            ModelMismatchError: The model is not the one that was asked for, and `model_mismatch` is "raise".
        """
        if isinstance(model, str) and model and model != self._served_model:
            self._named_model, self._reply_id = model, reply_id
        if self._named_model != self._served_model and self._accumulator.has_delta:
            if not self._mismatch_policy.check(self._events.call.request.model, self._named_model):
                self._events.call.mark_unloaded()
            self._served_model = self._named_model

    def _check_same_model(self, model: str, reply_id: object) -> None:
        """Checks that an event does not continue the answer of another model.

        Proxies send their progress as reasoning, under another id or under none. So reasoning under another id may
        precede the answer of any model.

        Raises:
            ModelChangedDuringExecutionError: The event continues the answer of another model.
        """
        named, accumulator = self._named_model, self._accumulator
        if named is None or self._mismatch_policy.ignores_names:
            return
        has_same_id = reply_id is not None and reply_id == self._reply_id
        has_begun = accumulator.has_answer or (has_same_id and accumulator.has_content)
        if has_begun and are_different_models(named, model):
            raise ModelChangedDuringExecutionError(
                f"the reply began with model {named!r} and went on with {model!r}",
                named,
                model,
                hint="the server swapped models mid-stream; Limits(max_loaded_models=1) can prevent that",
            )

    async def _read_to_end(self) -> _Reply_co:
        if not self._has_ended:
            async with self:
                async for _ in self:
                    pass
        return await self._accumulator.reply_in_slices()

    # Ending the stream

    def _on_done(self) -> None:
        """Ends the stream at `[DONE]`."""
        self._mark_complete()
        self._pending = _NO_EVENTS

    def _mark_complete(self) -> None:
        """Marks the reply as complete.

        Raises:
            LLMError: The reply is not complete, because the body contained an error as bare text, a line that was
                damaged on its way, or no answer at all.
        """
        if bare_text := self._events.bare_text:
            if not self._accumulator.is_finished:
                raise self._server_error(bare_text)
            # The decoder skips a line such as `eata: {"choices": ...}`, as the standard says. What the server says in
            # plain words after a whole answer does not matter, but JSON outside of an event is a part of the answer.
            if '"' in bare_text:
                raise self._fail(LLMStreamError(_DAMAGED_LINE, hint=_DAMAGED_LINE_HINT))
        if not self._accumulator.has_delta:
            raise self._fail(
                LLMStreamError(
                    "the stream ended without any part of an answer",
                    hint="the prompt may be longer than the loaded context: LM Studio then sends an empty stream;"
                    " shorten it, or load the model with a longer context",
                )
            )
        self._is_complete = True

    def _end_of_body(self) -> None:
        """Ends the stream where its body ends, which completes the reply only if it is finished.

        Raises:
            LLMError: The reply is not finished.
        """
        if self._accumulator.is_finished:
            self._mark_complete()
        elif bare_text := self._events.bare_text:
            raise self._server_error(bare_text)
        else:
            raise self._fail(
                LLMStreamError(
                    f"the stream was cut off: it ended without {self._EXPECTED_END}",
                    hint="the server stopped, crashed or was cut off; what had arrived is in .partial",
                )
            )

    def _server_error(self, text: str, *, is_broken_json: bool = False) -> LLMError:
        """Ends the stream with the error that the server reported, and returns that error."""
        error_body = parse_error_body(text, self._redact)
        context = self._events.call.context()
        return self._fail(failures.error_from_event(error_body, context, is_broken_json=is_broken_json))

    def _break_off(self, error: LLMError) -> None:
        """Ends the stream with an error that no event has caused. `.partial` then has everything that has arrived."""
        pending = list(self._pending)
        self._fail(error)
        self._add_to_partial(error, [*pending, *self._events.take_arrived()])

    def _add_to_partial(self, error: LLMError, events: Iterable[Event]) -> None:
        """Adds the events that will not be read to the `.partial` of the error that the stream has ended with."""
        # An error that one of these events reports no longer matters, and what follows it is not part of the answer.
        with suppress(LLMError):
            if self._unfinished_event is not None:
                run_at_once(self._unfinished_event)
            for event in events:
                self._read_event(event)
        error.completed(partial=self.partial)

    def _fail(self, error: LLMError) -> LLMError:
        """Ends the stream with an error: adds the context to it, closes the connection at once, and returns it."""
        if self._failure is not None:
            return error
        failures.report_lost_model(self._events.call, error)
        # The message may quote a chunk, and a chunk may repeat the key.
        if error.body is not None:
            error.body = self._redact(error.body)
        error.completed(
            self._redact(error.message),
            context=self._events.call.context(),
            status=self._events.status,
            partial=self.partial,
        )
        self._failure = error
        self._pending = _NO_EVENTS
        self._events.abort(error)
        return error


def is_large(event: Event) -> bool:
    """Returns whether an event takes so long to read that other tasks have to run meanwhile."""
    return len(event.data if isinstance(event, NamedEvent) else event) > SIZE_PER_STEP


def _says_nothing(value: object) -> bool:
    """Returns whether the data of an event is empty, such as the null that llama.cpp sends before several answers."""
    return value is None or value in ("", [])
