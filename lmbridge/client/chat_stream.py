"""The streams of chat completions, and their base class, which text completions share.

Iterating, closing and `collect` are those of `ReplyStream`.

What happens before there is a stream, such as an error of the request, is decided by `ServerApi.stream` in
`api_requests`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lmbridge._tasks import SIZE_PER_STEP
from lmbridge.client.answer_text import StreamedText
from lmbridge.client.chat_accumulator import ChatAccumulator
from lmbridge.client.error_body import Redact, is_error_object
from lmbridge.client.json_codec import decode_strictly
from lmbridge.client.reasoning import Piece, ReasoningSplitter
from lmbridge.client.reply_stream import ReplyStream, is_large
from lmbridge.client.served_model import MismatchPolicy
from lmbridge.client.surrogates import join_halves, join_halves_in_slices, may_hold_surrogates
from lmbridge.errors import LLMError
from lmbridge.transport import EventStream

if TYPE_CHECKING:
    from lmbridge.types import ChatCompletion, ChatCompletionChunk  # noqa: F401 - named in quotes below

_Chunk = TypeVar("_Chunk")
_Reply_co = TypeVar("_Reply_co", covariant=True)


def _join_text(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == "text")


class CompletionStream(ReplyStream[_Chunk, _Reply_co]):
    """A stream of chunks with `choices`, which is what chat and text completions send."""

    __slots__ = ()

    def _read_object(self, value: dict[str, Any], name: str, data: bytes) -> _Chunk:  # noqa: ARG002 - chunks need no name
        """Adds a chunk to the reply and returns it.

        Raises:
            LLMError: The object reports an error, or another model continues the reply.
        """
        self._check_no_error_object(value, data)
        try:
            chunk = self._add_from_model(value, value.get("model"), value.get("id"))
        except LLMError as error:
            self._fail(error)
            raise
        if self._halves or may_hold_surrogates(data):
            chunk = join_halves(chunk, self._halves)
        return cast("_Chunk", chunk)

    def _object_in_slices(
        self,
        value: dict[str, Any],
        name: str,  # noqa: ARG002 - chunks need no name
        data: bytes,
    ) -> Generator[None, None, _Chunk]:
        """Does what `_read_object` does, as a generator that yields whenever other tasks should run."""
        yield
        self._check_no_error_object(value, data)
        try:
            self._check_model(value.get("model"), value.get("id"))
            # The accumulator of text completions is a subclass of that of chats.
            accumulator = cast("ChatAccumulator", self._accumulator)
            chunk = yield from accumulator.add_in_slices(value)
            self._note_model(value.get("model"), value.get("id"))
        except LLMError as error:
            self._fail(error)
            raise
        yield
        if self._halves or may_hold_surrogates(data):
            chunk = yield from join_halves_in_slices(chunk, self._halves)
        return cast("_Chunk", chunk)

    def _check_no_error_object(self, value: dict[str, Any], data: bytes) -> None:
        if is_error_object(value):
            raise self._server_error(data.strip().decode("utf-8", "replace"))

    def _make_last_item(self, rest: dict[str, Any]) -> _Chunk:
        named = {"id": self._reply_id, "model": self._named_model}
        choices = [{**each, "finish_reason": None} for each in rest["choices"]]
        return cast("_Chunk", {key: value for key, value in named.items() if value} | {"choices": choices})


class ChatStream(CompletionStream["ChatCompletionChunk", "ChatCompletion"]):
    """The chunks of one chat completion, as the server sent them; see `ChatCompletionChunk`.

    For example::

        async with await client.chat_completion(messages, stream=True) as stream:
            async for chunk in stream:
                for choice in chunk["choices"]:
                    print(choice["delta"].get("content") or "", end="")

    Iterate it once, from one task at a time. It ends after `[DONE]`, or after a finish reason; any other end raises
    an error whose `.partial` is the reply so far. Leaving it early, in any way, closes the connection, so that the
    server stops generating, and frees its slot.

    Raises (while it is iterated):
        LLMStreamError: The stream was cut off, or the server reported an error other than those below.
        ContextLengthExceededError, ModelLoadError, LLMRateLimitError, ...: The server reported this error.
        LLMTimeoutError: A limit was exceeded; `phase` is "first_byte", "idle" or "total".
        ContextLengthExceededError: At the end: the server has cut the prompt (only with `context_overflow="raise"`,
            and only if the stream reports the usage).
        ModelMismatchError: The model that answers is not the one that was asked for (only with
            `model_mismatch="raise"`).
        ModelChangedDuringExecutionError: Another model continued the answer (except with `model_mismatch="ignore"`).
        TaskCancelledError: The stream was closed, by another task or before its end.
    """

    __slots__ = ("_check_reply",)

    def __init__(
        self,
        events: EventStream,
        mismatch_policy: MismatchPolicy,
        redact: Redact,
        choices: int = 1,
        check_reply: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(events, mismatch_policy, redact, ChatAccumulator(choices))
        self._check_reply = check_reply

    async def _check_whole_reply(self) -> None:
        if self._check_reply is not None:
            await self._check_reply({"usage": self._accumulator.usage, "model": self._named_model})
            # Reading past the end must not repeat a warning.
            self._check_reply = None

    def text(self) -> StreamedText:
        """Returns an iterator over the pieces of the answer's text, without the reasoning before it.

        For example::

            async with client.stream_chat(messages) as stream:
                async for text in stream.text():
                    print(text, end="", flush=True)

        Of several answers, only the first one counts. If a part of the stream has been read already, the pieces begin
        after that part.
        """
        splitter = ReasoningSplitter()
        return StreamedText(self, lambda chunk: _join_text(splitter.feed(chunk)), lambda: _join_text(splitter.close()))

    async def __anext__(self) -> ChatCompletionChunk:
        """Returns the next chunk.

        The fast path, for a chunk that only continues the reply, is written out here because another method call for
        each chunk would cost measurable time. `_read_object` and `_read_event` handle all other events.
        """
        try:
            while True:
                for event in self._pending:
                    chunk: Any = None
                    try:
                        # A named event, and None, raise a TypeError here.
                        chunk = decode_strictly(event) if len(event) <= SIZE_PER_STEP else None  # type: ignore[arg-type]
                        (choice,) = chunk["choices"]
                        continues = chunk["model"] == self._served_model and choice["delta"] and "error" not in chunk
                    except (KeyError, TypeError, ValueError, RecursionError):
                        continues = False
                    if continues and not self._halves:
                        try:
                            return self._add(chunk)  # type: ignore[return-value]  # a cast would be a call for each chunk
                        except LLMError as error:
                            self._fail(error)
                            raise
                    if isinstance(chunk, dict):
                        return self._read_object(chunk, "", cast("bytes", event))
                    item = await self._read_large_event(event) if is_large(event) else self._read_event(event)
                    if item is not None:
                        return item
                await self._receive()
        except (LLMError, StopAsyncIteration) as ending:
            return await self._last_item(ending)
