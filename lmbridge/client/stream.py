"""Streamed replies: the base class of the streams of all endpoints, and `collect`.

A stream is an instance of a class, and not an `async def` function with a `yield` in it, for three reasons:

- A stop button has to close a stream from another task. With a generator, that raises "asynchronous generator is
  already running".
- A generator that is dropped is closed by the event loop at some later time, in a task that is never awaited, while the
  server goes on generating.
- A generator has no way to return the reply so far.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, Self, TypeVar, overload

from lmbridge._checks import wrong_type
from lmbridge._copying import NotCopyable
from lmbridge.client import failures
from lmbridge.client.chat_accumulator import ChatAccumulator, accumulator_for
from lmbridge.client.json_codec import decode_json
from lmbridge.client.names import MismatchPolicy, are_different_models
from lmbridge.client.surrogates import Halves, rest_of_halves
from lmbridge.client.usage import usage_in_stream
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

if TYPE_CHECKING:
    from lmbridge.types import ChatCompletion

logger: logging.Logger = logging.getLogger("lmbridge.client")

_DONE: Final = b"[DONE]"
_GRACE_AFTER_TEXT: Final = 2.0
"""The most seconds to wait for the end of the body after a finish reason that arrived together with text.

Some servers put a finish reason into every chunk, and a slow model may need this long for the next one.
"""
_NO_EVENTS: Final[Iterator[Event]] = iter(())

_Item = TypeVar("_Item")
_Reply_co = TypeVar("_Reply_co", covariant=True)


class Accumulator(Protocol[_Reply_co]):
    """The interface of the accumulators, which merge the events of a stream into the reply so far."""

    @property
    def has_begun(self) -> bool:
        """Whether an event has been added to the reply."""
        ...

    @property
    def has_delta(self) -> bool:
        """Whether any of the events held a piece of an answer."""
        ...

    @property
    def has_content(self) -> bool:
        """Whether any of the events held a piece of an answer that is not empty."""
        ...

    @property
    def has_answer(self) -> bool:
        """Whether any of the events held a piece of an answer that is more than reasoning."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether the reply is complete, even if the stream breaks now."""
        ...

    @property
    def ends_with_text(self) -> bool:
        """Whether the newest finish reason arrived together with a piece of an answer, so that more may follow."""
        ...

    @property
    def usage(self) -> Any:
        """The token usage that the server has sent so far, or None."""
        ...

    def add(self, chunk: Mapping[str, Any], /) -> Mapping[str, Any]:
        """Adds the data of an event, and returns the event for the caller, with the fields that lmbridge guarantees.

        Raises:
            LLMError: The shape of the data is unknown, or it reports an error.
        """
        ...

    def reply(self) -> _Reply_co:
        """Returns the reply so far as a new dict."""
        ...


class ReplyStream(NotCopyable, AsyncGenerator[_Item, None], Generic[_Item, _Reply_co]):
    """The base class of the streams of all endpoints: an async generator of the pieces of one reply.

    Iterate it once, from one task at a time. It is also an async context manager. Leaving it early, in any way, closes
    the connection, so that the server stops generating, and frees its slot.

    A subclass defines `_read_object`, which turns the JSON object of an event into an item of the iteration.
    """

    _instead_of_a_copy = "copy the chunks that it yields, or what collect() returns"

    __slots__ = (
        "_accumulator",
        "_add",
        "_events",
        "_failure",
        "_halves",
        "_is_complete",
        "_mismatch_policy",
        "_named_model",
        "_pending",
        "_redact",
        "_reply_id",
        "_served_model",
    )

    _EXPECTED_END: str = "[DONE] or a finish reason"
    """The proper end of such a stream, which the error for a stream that was cut off mentions."""

    def __init__(
        self,
        events: EventStream,
        mismatch_policy: MismatchPolicy,
        redact: failures.Redact,
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
        events.call.read_usage = functools.partial(usage_in_stream, accumulator)
        # The model that the events have named last, and the id of the reply in these events.
        self._named_model: str | None = None
        self._reply_id: object = None
        # The named model, once it has been compared with the one that was asked for.
        self._served_model: str | None = None
        # The halves of characters that have been held back until their other halves arrive.
        self._halves: Halves = {}
        self._is_complete = False
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
        """The headers of the response. Upper and lower case do not matter in their names."""
        return self._events.headers

    def __repr__(self) -> str:
        state = "failed" if self._failure else "ended" if self._events.closed else "open"
        return f"<{type(self).__name__} model={self._served_model!r} {state}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _Item:
        try:
            while True:
                # `_pending` is an iterator, so the loop continues after the event for which the last call returned.
                for event in self._pending:
                    if (item := self._read_event(event)) is not None:
                        return item
                await self._receive()
        except (LLMError, StopAsyncIteration) as ending:
            return await self._last_item(ending)

    async def asend(self, value: None) -> _Item:
        """Returns the next item. Only None can be sent, because a stream takes no values."""
        if value is not None:
            raise TypeError(f"a {type(self).__name__} takes no values; iterate it")
        return await self.__anext__()

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> _Item:
        """Closes the stream and raises the exception."""
        await self.aclose()
        error = typ if isinstance(typ, BaseException) else typ() if val is None else val
        raise error.with_traceback(tb) if tb is not None else error

    async def aclose(self) -> None:
        """Closes the stream; may be called from any task, and more than once.

        Before the end of the reply this closes the connection. A task that reads the stream, now or later, then gets
        `TaskCancelledError` and never a silent end.
        """
        if self._is_complete:
            await self._events.drain()
        elif self._failure is None:
            self._break_off(TaskCancelledError("the stream was closed before its end"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def collect(self) -> _Reply_co:
        """Reads the stream to its end, and returns the dict that the plain call would have returned.

        What was read before is a part of it.

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
            self._log_missing_end(error)
            self._is_complete = True
            return
        except LLMError as error:
            self._fail(error)
            raise
        except asyncio.CancelledError:
            self._break_off(TaskCancelledError("the stream was closed: its reader was cancelled"))
            raise
        if self._failure is not None:
            # Another task has closed the stream, while these events were arriving.
            self._add_to_partial(self._failure, events)
            raise self._failure
        self._pending = iter(events)

    def _log_missing_end(self, error: LLMError) -> None:
        """Logs that neither `[DONE]` nor the end of the body followed the finish reason."""
        if self._accumulator.ends_with_text and not self._accumulator.usage:
            logger.warning(
                "an answer may be incomplete, because neither [DONE] nor the end of the body followed its finish"
                " reason, which arrived together with text: %s",
                error,
            )
        else:
            logger.debug("the body did not end after the finish reason, when the reply was complete: %s", error)

    async def _last_item(self, ending: LLMError | StopAsyncIteration) -> _Item:
        """Returns what the stream still holds back when it ends, or raises the ending if that is nothing.

        The next call then meets the same ending.
        """
        may_go_on = isinstance(ending, StopAsyncIteration) or (
            ending is self._failure and not isinstance(ending, TaskCancelledError)
        )
        if self._halves and may_go_on and (rest := rest_of_halves(self._halves)) is not None:
            return self._make_last_item(rest)
        if isinstance(ending, ModelNotFoundError):
            await self._complete_error(ending)
        raise ending

    def _make_last_item(self, rest: dict[str, Any]) -> _Item:
        """Returns the item for the last piece of a stream, which no event had."""
        raise NotImplementedError

    async def _complete_error(self, error: LLMError) -> None:
        """Adds to an error of this stream, once, what another request can find out."""
        request = self._events.call.request
        complete_error, request.complete_error = request.complete_error, None
        if complete_error is not None:
            await complete_error(error)

    def _read_event(self, event: Event) -> _Item | None:
        """Returns the item for an event, or None for `[DONE]` and for events that the iteration skips.

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
            if self._events.ended and name != "error" and text.startswith(("{", "[")):
                # The end of the body cut this event off. `_end_of_body` raises the error that says so.
                return None
            raise self._server_error(text) from None
        if value == "[DONE]":
            self._on_done()
            return None
        if name != "error" and _says_nothing(value):
            return None
        if not isinstance(value, dict) or name == "error":
            raise self._server_error(data.decode("utf-8", "replace"))
        return self._read_object(value, name, data)

    def _add_from_model(self, value: dict[str, Any], model: object, reply_id: object) -> Mapping[str, Any]:
        """Adds an event to the reply, and returns the event for the caller.

        As soon as there is any delta, the model in the event is compared with the one that was asked for. As soon as
        there is an answer, it is compared with the one that earlier events named. Until then, a name means little:
        some proxies announce with events that name the proxy that they load a model.

        Args:
            value: The event.
            model: The model that it names. Anything but a string that is not empty counts as no name.
            reply_id: The id of the reply that it names.

        Raises:
            ModelMismatchError: The model is not the one that was asked for, and `model_mismatch` is "raise".
            ModelChangedDuringExecutionError: Another model continues the answer, and `model_mismatch` is not "ignore".
            LLMError: The event reports an error, or its shape is unknown.
        """
        if isinstance(model, str) and model and model != self._served_model:
            self._check_same_model(model, reply_id)
            added = self._add(value)
            self._named_model, self._reply_id = model, reply_id
        else:
            added = self._add(value)
        if self._named_model != self._served_model and self._accumulator.has_delta:
            if not self._mismatch_policy.check(self._events.call.request.model, self._named_model):
                self._events.call.mark_unloaded()
            self._served_model = self._named_model
        return added

    def _check_same_model(self, model: str, reply_id: object) -> None:
        """Checks that an event does not continue the answer of another model.

        Proxies send their progress as reasoning, under another id or under none. So reasoning under another id
        may precede the answer of any model.

        Raises:
            ModelChangedDuringExecutionError: It does.
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
        async with self:
            async for _ in self:
                pass
        return self._accumulator.reply()

    # Ending the stream

    def _on_done(self) -> None:
        """Ends the stream at `[DONE]`."""
        self._mark_complete()
        self._pending = _NO_EVENTS

    def _mark_complete(self) -> None:
        """Marks the reply as complete.

        Raises:
            LLMError: The reply is not complete, because the body contained an error as bare text, or no answer at all.
        """
        if (bare_text := self._events.bare_text) and not self._accumulator.is_finished:
            raise self._server_error(bare_text)
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

    def _server_error(self, text: str) -> LLMError:
        """Ends the stream with the error that the server reported, and returns that error."""
        error_body = failures.parse_error_body(text, self._redact)
        return self._fail(failures.error_from_event(error_body, self._events.call.context()))

    def _break_off(self, error: LLMError) -> None:
        """Ends the stream with an error that no event has caused. `.partial` then has everything that has arrived."""
        pending = list(self._pending)
        self._fail(error)
        self._add_to_partial(error, [*pending, *self._events.take_arrived()])

    def _add_to_partial(self, error: LLMError, events: Iterable[Event]) -> None:
        """Adds the events that will not be read to the `.partial` of the error that the stream has ended with."""
        # What an event reports does not matter any longer, and what follows such an event is not part of the answer.
        with suppress(LLMError):
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


def _says_nothing(value: object) -> bool:
    """Returns whether the data of an event is empty, such as the null that llama.cpp puts before several answers."""
    return value is None or value in ("", [])


@overload
async def collect(stream: ReplyStream[Any, _Reply_co]) -> _Reply_co: ...


@overload
async def collect(stream: AsyncIterable[Mapping[str, Any]]) -> ChatCompletion: ...


async def collect(stream: AsyncIterable[Mapping[str, Any]]) -> Any:
    """Reads a stream to its end, and returns the dict that the plain call would have returned.

    For example::

        stream = await client.chat_completion(messages, stream=True)
        reply = await collect(stream)
        print(reply["choices"][0]["message"]["content"])

    Content, reasoning and tool calls are joined; usage and finish reason are kept. Servers send the usage of a stream
    only when asked, with `stream_options={"include_usage": True}`; otherwise it is None. If an error or a cancellation
    interrupts the reading, the stream is closed.

    Args:
        stream: A `ChatStream`, `TextStream` or `ResponseStream`. The result is the whole reply, even if you have read a
            part of the stream, or all of it, before. Any other asynchronous iterable of the chunks of a chat or text
            completion is accepted as well; then the result contains only the chunks that it still yields.

    Raises:
        LLMStreamError: A chunk has an unknown shape, or the iterable yielded no chunk.
        LLMError: The errors that iterating the stream raises.
    """
    if not hasattr(stream, "__aiter__"):
        is_reply = isinstance(stream, Mapping)
        hint = "it is a whole reply already" if is_reply else "pass what a call with stream=True returns"
        raise wrong_type("stream", "a stream", stream, hint)
    if isinstance(stream, ReplyStream):
        return await stream._read_to_end()  # noqa: SLF001 - it has accumulated what was read before
    accumulator: ChatAccumulator | None = None
    try:
        async for chunk in stream:
            accumulator = accumulator or accumulator_for(chunk)
            accumulator.add(chunk)
    except BaseException as error:
        # A cancellation, too, has to end the generation.
        if isinstance(error, LLMError) and error.partial is None and accumulator is not None and accumulator.has_begun:
            error.completed(partial=accumulator.reply())
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()
        raise
    if accumulator is None:
        raise LLMStreamError("there was no chunk to collect", hint="the stream may have been read before")
    return accumulator.reply()
