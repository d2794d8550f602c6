"""Events of a streamed response folded into the response that the plain call would have returned."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final, cast

from lmbridge._text import shorten
from lmbridge.errors import LLMStreamError
from lmbridge.types import Response

_LAST: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
_WITH_RESPONSE: Final = _LAST | {"response.created", "response.in_progress", "response.queued"}
_TO_PART: Final = {
    "response.output_text.delta": ("content", "output_text", "text"),
    "response.refusal.delta": ("content", "refusal", "refusal"),
    "response.reasoning_text.delta": ("content", "reasoning_text", "text"),
    "response.reasoning_summary_text.delta": ("summary", "summary_text", "text"),
}
"""Event to where its piece of text belongs: the item's list of parts, the type of the part, the part's field."""
_TO_ITEM: Final = frozenset({"response.function_call_arguments.delta", "response.mcp_call_arguments.delta"})
_PARTS: Final = {
    "response.content_part.added": ("content", True),
    "response.content_part.done": ("content", False),
    "response.reasoning_summary_part.added": ("summary", True),
    "response.reasoning_summary_part.done": ("summary", False),
}
"""Event to the item's list that its part belongs to, and whether it is a new one."""


class ResponseFold:
    """A response so far.

    The event that ends a stream holds the whole response; until then it is put together from the pieces. Servers
    leave ids and indices out (llama.cpp all indices): then a piece belongs to the newest item, or part of it.

    Attributes:
        begun: Whether there was any event.
        finished: Whether the event that ends the stream was there.
    """

    __slots__ = ("_items", "_output", "_response", "begun", "finished")

    def __init__(self) -> None:
        self.begun = False
        self.finished = False
        self._response: dict[str, Any] = {}
        self._output: list[Any] = []  # as the last event tells it
        self._items: list[_Item] = []

    @property
    def has_delta(self) -> bool:
        """Whether there was any piece of an answer; a response that says it is whole is one, even without output."""
        return self.finished or bool(self._items)

    def add(self, event: Mapping[str, Any]) -> None:
        """Adds an event's data.

        Raises:
            LLMStreamError: it is of an unknown shape.
        """
        try:
            self._add(str(event.get("type")), event)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            shown = shorten(repr(event), 200)
            raise LLMStreamError(f"the stream holds an event of an unknown shape: {shown}", exc) from exc

    def _add(self, kind: str, event: Mapping[str, Any]) -> None:
        self.begun = True
        if kind in _WITH_RESPONSE:
            self._response.update(event["response"])
            if kind in _LAST:
                self._output = list(event["response"].get("output") or ())
                self.finished = True
        elif kind == "response.output_item.added":
            self._items.append(_Item(event["item"]))
        elif kind == "response.output_item.done":
            self._item(event["item"].get("id")).replace(event["item"])
        elif kind in _PARTS:
            where, is_new = _PARTS[kind]
            index = None if is_new else _index(event)
            self._item(event.get("item_id")).put(where, index, event["part"], is_new=is_new)
        elif kind in _TO_PART:
            self._item(event.get("item_id")).write(*_TO_PART[kind], _index(event), event["delta"])
        elif kind in _TO_ITEM:
            self._item(event.get("item_id")).write_arguments(event["delta"])

    def _item(self, item_id: str | None) -> _Item:
        """The item with this id; without an id, the newest one; a new one if there is none."""
        for item in reversed(self._items):
            if item_id is None or item.id == item_id:
                return item
        item = _Item({"type": "message", "role": "assistant"} | ({"id": item_id} if item_id else {}))
        self._items.append(item)
        return item

    def reply(self) -> Response:
        """The response so far, as a new dict."""
        output = list(self._output) or [item.reply() for item in self._items]
        return cast("Response", {"object": "response", **self._response, "output": output})


def _index(event: Mapping[str, Any]) -> int | None:
    index = event.get("content_index", event.get("summary_index"))
    return index if isinstance(index, int) else None


class _Item:
    """An item of the output. A text that grows is a `StringIO` until the reply is made."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.replace(fields)

    @property
    def id(self) -> Any:
        return self._fields.get("id")

    def replace(self, fields: Mapping[str, Any]) -> None:
        lists = {key: [dict(part) for part in fields[key]] for key in ("content", "summary") if fields.get(key)}
        self._fields: dict[str, Any] = {**fields, **lists}

    def put(self, where: str, index: int | None, part: Mapping[str, Any], *, is_new: bool) -> None:
        """Adds a part, or puts it in the place of the one that grew."""
        parts = self._parts(where)
        at = len(parts) - 1 if index is None else index
        if is_new or not 0 <= at < len(parts):
            parts.append(dict(part))
        else:
            parts[at] = dict(part)

    def write(self, where: str, kind: str, field: str, index: int | None, piece: str) -> None:
        """Adds a piece of text to a part: the one at `index`, or else the newest."""
        parts = self._parts(where)
        at = len(parts) - 1 if index is None else index
        if not 0 <= at < len(parts):
            parts.append({"type": kind})
            at = -1
        _grow(parts[at], field, piece)

    def write_arguments(self, piece: str) -> None:
        _grow(self._fields, "arguments", piece)

    def reply(self) -> dict[str, Any]:
        lists = {
            key: [_told(part) for part in self._fields[key]] for key in ("content", "summary") if self._fields.get(key)
        }
        return {**_told(self._fields), **lists}

    def _parts(self, where: str) -> list[dict[str, Any]]:
        if not self._fields.get(where):
            self._fields[where] = []  # its own, not the list of an event
        return cast("list[dict[str, Any]]", self._fields[where])


def _grow(fields: dict[str, Any], key: str, piece: str) -> None:
    text = fields.get(key)
    if not isinstance(text, io.StringIO):
        fields[key] = grown = io.StringIO()
        grown.write(text or "")
        text = grown
    text.write(piece)


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.getvalue() if isinstance(value, io.StringIO) else value for key, value in fields.items()}
