"""`StreamBeginning`: finds out when the answer in an event stream begins.

It uses no socket, no event loop and no clock.

Servers send comments while a model is loading or waiting, so that the connection is not taken for dead. Neither these
nor the fields `id:` and `retry:` are a part of the answer: the model may still fail to load after them, and the request
can still be given to another server.
"""

from __future__ import annotations

from typing import Final

from lmbridge.errors import LLMStreamError
from lmbridge.transport.decompression import BrokenCompression, UnsupportedEncoding, decompressor_for
from lmbridge.transport.sse import BOM, Event, SSEDecoder

_BEFORE_ANSWER: Final = (b":", b"id:", b"retry:")
"""The beginnings of lines that belong to no answer."""
_LONGEST_FIELD: Final = max(map(len, _BEFORE_ANSWER))


class StreamBeginning:
    """Watches the parts of an event stream until its answer begins.

    A body that cannot be decompressed counts as an answer, because nobody can see that it is not one.

    Args:
        content_encoding: The value of the header `Content-Encoding`, or None.
        whole_event: Whether the first event has to be complete. Otherwise, its first line is enough, even a part of it.
    """

    def __init__(self, content_encoding: str | None, *, whole_event: bool) -> None:
        self.is_found: bool = False
        """Whether enough of the stream has been read: the answer has begun and, if `whole_event` is True, its first
        event is complete or too large to wait for."""
        self.has_begun: bool = False
        """Whether any line of the answer has arrived."""
        self.first_event: Event | None = None
        """The first event, once it is complete. It is looked for only if `whole_event` is True."""
        # The beginning of the line that has not ended yet. Its rest cannot change what kind of line it is.
        self._line = b""
        self._may_have_bom = True
        self._decoder = SSEDecoder() if whole_event else None
        try:
            self._decompressor = decompressor_for(content_encoding)
        except UnsupportedEncoding:
            self._decompressor = None
            self.has_begun = self.is_found = True

    def feed(self, part: bytes) -> None:
        """Looks at the next part of the body."""
        if self.is_found:
            return
        if self._decompressor is None:
            self._look_at(part)
            return
        self._decompressor.feed(part)
        try:
            while not self.is_found and (text := self._decompressor.next_part()):
                self._look_at(text)
        except BrokenCompression:
            self.has_begun = self.is_found = True

    def _look_at(self, text: bytes) -> None:
        if not self.has_begun:
            self.has_begun = self._begins_in(text)
        if self._decoder is None:
            self.is_found = self.has_begun
            return
        try:
            events = self._decoder.feed(text)
        except LLMStreamError:
            # The event is too large to wait for.
            self.is_found = True
            return
        if events:
            self.first_event, self.is_found = events[0], True

    def _begins_in(self, text: bytes) -> bool:
        """Returns whether a line of the answer begins in these bytes, or began before and continues in them."""
        text = self._line + text
        if self._may_have_bom:
            if len(text) < len(BOM) and BOM.startswith(text):
                self._line = text
                return False
            text = text.removeprefix(BOM)
            self._may_have_bom = False
        lines = text.splitlines(keepends=True)
        self._line = lines.pop()[:_LONGEST_FIELD] if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        if any(line.rstrip(b"\r\n") and not line.startswith(_BEFORE_ANSWER) for line in lines):
            return True
        is_undecided = any(field.startswith(self._line) for field in _BEFORE_ANSWER)
        return not (is_undecided or self._line.startswith(_BEFORE_ANSWER))
