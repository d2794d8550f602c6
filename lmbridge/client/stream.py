"""Streamed replies: what all their streams have in common, that of a chat completion, and `collect`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, Self, TypeVar, cast, overload

from lmbridge.client import failures
from lmbridge.client.fold import Fold, fold_for
from lmbridge.client.names import MismatchPolicy
from lmbridge.client.wire import decode_json, decode_strictly
from lmbridge.errors import (
    LLMError,
    LLMStreamError,
    LLMTimeoutError,
    ModelChangedDuringExecutionError,
    TaskCancelledError,
)
from lmbridge.transport import Event, EventStream, NamedEvent

if TYPE_CHECKING:
    from lmbridge.types import ChatCompletion, ChatCompletionChunk  # noqa: F401 - in the quotes of a base class

logger = logging.getLogger("lmbridge.client")

_DONE: Final = b"[DONE]"
_NOTHING: Final[Iterator[Event]] = iter(())
_CUT_HINT: Final = "the server stopped, crashed or was cut off; what had arrived is in .partial"


_Item = TypeVar("_Item")
_Reply_co = TypeVar("_Reply_co", covariant=True)


class Folding(Protocol[_Reply_co]):
    """A reply that grows by what its stream hands out."""

    @property
    def begun(self) -> bool:
        """Whether anything was added."""

    @property
    def has_delta(self) -> bool:
        """Whether that held any piece of an answer."""

    @property
    def finished(self) -> bool:
        """Whether the reply is whole, even if nothing more comes."""

    def add(self, chunk: Mapping[str, Any], /) -> None:
        """Adds what an event held; raises `LLMStreamError` if it is of an unknown shape."""

    def reply(self) -> _Reply_co:
        """The reply so far, as a new dict."""


class ReplyStream(AsyncGenerator[_Item, None], Generic[_Item, _Reply_co]):
    """The pieces of one reply: the base of the streams of all endpoints.

    Iterate it, once and by one task at a time; it is an async context manager too. Leaving it early, in any way,
    closes the connection, so that the server stops generating, and gives its permit back.
    """

    __slots__ = ("_add", "_done", "_events", "_fault", "_fold", "_left", "_model", "_names", "_redact")

    def __init__(
        self, events: EventStream, names: MismatchPolicy, redact: failures.Redact, fold: Folding[_Reply_co]
    ) -> None:
        self._events = events
        self._names = names
        self._redact = redact
        # Events are decoded as they are handed out, not as they arrive: hundreds of decoded chunks waiting at a time
        # would keep the garbage collector busy for a third of the whole cost.
        self._left: Iterator[Event] = _NOTHING
        self._fold = fold
        self._add = fold.add
        self._model: str | None = None
        self._done = False
        self._fault: LLMError | None = None

    @property
    def partial(self) -> _Reply_co | None:
        """What `collect` would make of the stream so far, as a new dict; None before the first chunk."""
        return self._fold.reply() if self._fold.begun else None

    def __repr__(self) -> str:
        state = "failed" if self._fault else "ended" if self._events.closed else "open"
        return f"<{type(self).__name__} model={self._model!r} {state}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _Item:
        while True:
            for event in self._left:  # an iterator: it goes on where the last chunk was
                chunk: Any = None
                try:
                    chunk = decode_strictly(event)  # type: ignore[arg-type]  # see the except
                    usual = chunk["model"] == self._model and "choices" in chunk and "error" not in chunk
                except (KeyError, TypeError, ValueError, RecursionError):  # an event with a name is a TypeError
                    usual = False
                if usual:
                    try:
                        self._add(chunk)
                    except LLMError as error:
                        self._fail(error)
                        raise
                    return chunk  # type: ignore[no-any-return]  # no cast: it would be a call for each chunk
                other = self._add_unusual(chunk, event) if isinstance(chunk, dict) else self._read_unusual(event)
                if other is not None:
                    return other
            await self._read_more()

    async def asend(self, value: None) -> _Item:
        """The next chunk; a stream takes no values."""
        if value is not None:
            raise TypeError(f"a {type(self).__name__} takes no values; iterate it")
        return await self.__anext__()

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> _Item:
        """Closes the stream and raises."""
        await self.aclose()
        error = typ if isinstance(typ, BaseException) else typ() if val is None else val
        raise error.with_traceback(tb) if tb is not None else error

    async def aclose(self) -> None:
        """Closes the stream, from any task; idempotent.

        Before its end the connection is closed, and whoever reads, now or later, gets `TaskCancelledError`.
        """
        if self._done:
            await self._events.drain()
        elif self._fault is None:
            self._fail(TaskCancelledError("the stream was closed before its end"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # Reading

    async def _read_more(self) -> None:
        """Waits for more events; raises the end of the stream, whichever it is."""
        if self._fault is not None:
            raise self._fault
        if not self._done and self._events.ended:
            self._end_of_body()
        if self._done:
            await self._events.drain()
            raise StopAsyncIteration
        try:
            self._left = iter(await self._events.read())
        except (LLMStreamError, LLMTimeoutError) as error:
            if not self._fold.finished:
                self._fail(error)
                raise
            logger.debug("after the finish reason: %s", error)
            self._done = True
        except LLMError as error:
            self._fail(error)
            raise
        except asyncio.CancelledError:
            self._fail(TaskCancelledError("the stream was closed: its reader was cancelled"))
            raise

    def _read_unusual(self, event: Event) -> _Item | None:
        """The chunk of an event that is not just one more piece of the same reply; None for the end, or for nothing.

        Raises:
            LLMError: the event reports an error, or is one.
        """
        name, data = (event.name, event.data) if isinstance(event, NamedEvent) else ("", event)
        data = data.strip()
        if data == _DONE:
            self._finish()
            self._left = _NOTHING
            return None
        if not data and name != "error":
            return None
        text = data.decode("utf-8", "replace")
        try:
            chunk = decode_json(data)
        except ValueError:
            if self._events.ended and name != "error" and text.startswith(("{", "[")):
                return None  # the end of the body cut it off: that is told when the body's end is
            raise self._report(text) from None
        if not isinstance(chunk, dict) or name == "error":
            raise self._report(text)
        return self._add_unusual(chunk, data)

    def _add_unusual(self, chunk: dict[str, Any], data: Event) -> _Item:
        """Adds a chunk that begins the reply, or names no model.

        Raises:
            LLMError: it is no chunk, but reports an error; or it is a chunk of another reply.
        """
        if failures.is_error_object(chunk):
            raise self._report(cast("bytes", data).strip().decode("utf-8", "replace"))
        try:
            self._note_model(chunk.get("model"))
            self._add(chunk)
        except LLMError as error:
            self._fail(error)
            raise
        return cast("_Item", chunk)

    def _note_model(self, model: str | None) -> None:
        """Notes the name of the model that answers.

        Raises:
            ModelMismatchError: it is not the one that was asked for, and that is to be an error.
            ModelChangedDuringExecutionError: it is not the one of the chunks before.
        """
        if not model or model == self._model:
            return
        if self._model is not None:
            raise ModelChangedDuringExecutionError(
                f"the reply began with model {self._model!r} and went on with {model!r}",
                self._model,
                model,
                hint="the server swapped models in mid-stream; send requests for different models one after another",
            )
        if not self._names.check(self._events.call.request.model, model):
            self._events.call.mark_unloaded()
        self._model = model

    async def _collect(self) -> _Reply_co:
        async with self:
            async for _ in self:
                pass
        return self._fold.reply()

    # Endings

    def _finish(self) -> None:
        if (stray := self._events.stray) and not self._fold.finished:
            raise self._report(stray)
        if not self._fold.has_delta:
            raise self._fail(
                LLMStreamError(
                    "the stream ended without a single piece of an answer",
                    hint="the prompt may be longer than the loaded context, which LM Studio answers like this;"
                    " shorten it, or load the model with a longer context",
                )
            )
        self._done = True

    def _end_of_body(self) -> None:
        """The body ended: that is the end of the reply only after a finish reason."""
        if self._fold.finished:
            self._finish()
        elif stray := self._events.stray:
            raise self._report(stray)
        else:
            raise self._fail(
                LLMStreamError("the stream was cut off: it ended without [DONE] or a finish reason", hint=_CUT_HINT)
            )

    def _report(self, text: str) -> LLMError:
        said = failures.parse_error_body(self._redact(text))
        return self._fail(failures.error_from_event(said, self._events.call.context()))

    def _fail(self, error: LLMError) -> LLMError:
        """Ends the stream with an error, which is told what had arrived; the connection is closed now."""
        if failures.means_model_unloaded(error):
            self._events.call.mark_unloaded()
        # The message is redacted because it may quote a chunk.
        error.completed(
            self._redact(error.message),
            context=self._events.call.context(),
            status=self._events.status,
            partial=self.partial,
        )
        self._fault = error
        self._left = _NOTHING
        self._events.abort(error)
        return error


class ChatStream(ReplyStream["ChatCompletionChunk", "ChatCompletion"]):
    """The chunks of one chat completion, as the server sent them.

    Iterate it, once and by one task at a time; it is an async context manager too. It ends after `[DONE]` or a
    finish reason; anything else raises, with `.partial`. Leaving it early, in any way, closes the connection, so
    that the server stops generating, and gives its permit back.

    Raises (while it is iterated):
        LLMStreamError: it was cut off, or the server reported an error that is none of those below.
        ContextLengthExceededError, ModelLoadError, LLMRateLimitError, ...: the server reported one.
        LLMTimeoutError: phase "first_byte", "idle" or "total".
        ModelMismatchError: another model answers (`model_mismatch="raise"`).
        ModelChangedDuringExecutionError: the model's name changed between two chunks.
        TaskCancelledError: it was closed, by another task or before its end.
    """

    __slots__ = ()

    def __init__(self, events: EventStream, names: MismatchPolicy, redact: failures.Redact, answers: int = 1) -> None:
        super().__init__(events, names, redact, Fold(answers))


@overload
async def collect(stream: ReplyStream[Any, _Reply_co]) -> _Reply_co: ...


@overload
async def collect(stream: AsyncIterable[Mapping[str, Any]]) -> ChatCompletion: ...


async def collect(stream: AsyncIterable[Mapping[str, Any]]) -> Any:
    """Folds a stream of chunks into the dict that the plain call would have returned.

    Content, reasoning and tool calls are joined, usage and finish reason kept; usage that the stream did not tell is
    None (servers tell it when asked with `stream_options={"include_usage": True}`). The stream is closed if an error
    interrupts it. Of a stream of ours it is the whole reply, also if some or all of it was read before.

    Args:
        stream: A `ChatStream`, `TextStream` or `ResponseStream`, or any other iterable of the chunks of a chat or
            text completion.

    Raises:
        LLMError: what iterating the stream raises.
        LLMStreamError: a chunk is none, or there was none at all.
    """
    if isinstance(stream, ReplyStream):
        return await stream._collect()  # noqa: SLF001 - it has folded what was read of it before
    fold: Fold | None = None
    try:
        async for chunk in stream:
            fold = fold or fold_for(chunk)
            fold.add(chunk)
    except BaseException as error:
        if isinstance(error, LLMError) and error.partial is None and fold is not None and fold.begun:
            error.completed(partial=fold.reply())
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()
        raise
    if fold is None:
        raise LLMStreamError("there was no chunk to collect", hint="has the stream been read already?")
    return fold.reply()
