"""`Accumulator`: the interface that `ReplyStream` expects of the accumulators of all endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

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

    async def reply_in_slices(self) -> _Reply_co:
        """Returns what `reply` returns for a complete reply, and lets other tasks run between parts of the work."""
        ...
