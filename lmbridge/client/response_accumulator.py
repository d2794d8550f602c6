"""Events of a streamed response, accumulated into the response that the plain call would have returned.

The last event of such a stream contains the whole response, so a stream that arrives in full would need no
accumulation. It is needed for streams that fail, because their errors carry the response so far as `.partial`. As for
chats, pieces are merged one by one, and only their text is kept; `chat_accumulator` explains why.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from lmbridge._text import shorten
from lmbridge.errors import LLMStreamError
from lmbridge.types import Response

_QUOTED_EVENT_CHARACTERS: Final = 200
"""The number of characters of a malformed event that the error quotes."""


class _TextTarget(NamedTuple):
    """The place in an item of the output to which an event adds a piece of text."""

    list_name: str
    """The list of parts in the item: "content" or "summary"."""
    part_type: str
    """The type of a part that is created for the text."""
    field: str
    """The field of the part that grows."""


_LAST_EVENTS: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
_EVENTS_WITH_RESPONSE: Final = _LAST_EVENTS | {"response.created", "response.in_progress", "response.queued"}
_TEXT_EVENTS: Final = {
    "response.output_text.delta": _TextTarget("content", "output_text", "text"),
    "response.refusal.delta": _TextTarget("content", "refusal", "refusal"),
    "response.reasoning_text.delta": _TextTarget("content", "reasoning_text", "text"),
    "response.reasoning_summary_text.delta": _TextTarget("summary", "summary_text", "text"),
}
_ARGUMENT_EVENTS: Final = frozenset({"response.function_call_arguments.delta", "response.mcp_call_arguments.delta"})
_NEW_PART_EVENTS: Final = {
    "response.content_part.added": "content",
    "response.reasoning_summary_part.added": "summary",
}
"""The list of the item to which a new part is appended, by the type of the event."""
_FINISHED_PART_EVENTS: Final = {
    "response.content_part.done": "content",
    "response.reasoning_summary_part.done": "summary",
}
"""The list of the item in which a finished part replaces the one that grew, by the type of the event."""


class ResponseAccumulator:
    """Merges the events of a response into the response so far.

    Servers leave ids and indices out (llama.cpp leaves out all indices). A piece without them belongs to the newest
    item, and to the newest part of it.

    Attributes:
        has_begun: Whether any event was added.
        is_finished: Whether the event that ends the stream was added.
    """

    __slots__ = ("_final_output", "_items", "_response", "has_begun", "is_finished")

    def __init__(self) -> None:
        self.has_begun: bool = False
        self.is_finished: bool = False
        self._response: dict[str, Any] = {}
        self._final_output: list[Any] = []
        self._items: list[_ItemAccumulator] = []

    @property
    def has_delta(self) -> bool:
        """Whether there was any piece of an answer. A response that is complete without any output counts as well."""
        return self.is_finished or bool(self._items)

    @property
    def has_content(self) -> bool:
        """Whether there was any piece of an answer; for responses, this is the same as `has_delta`."""
        return self.has_delta

    @property
    def usage(self) -> Any:
        """The token usage in the last event that had one, or None."""
        return self._response.get("usage")

    def add(self, event: Mapping[str, Any]) -> None:
        """Adds the data of an event. Events of an unknown type add nothing.

        Raises:
            LLMStreamError: The event does not have the shape that events of its type have.
        """
        try:
            self._add(str(event.get("type")), event)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            shown = shorten(repr(event), _QUOTED_EVENT_CHARACTERS)
            raise LLMStreamError(f"the stream holds an event of an unknown shape: {shown}", exc) from exc

    def _add(self, event_type: str, event: Mapping[str, Any]) -> None:
        self.has_begun = True
        if event_type in _EVENTS_WITH_RESPONSE:
            self._response.update(event["response"])
            if event_type in _LAST_EVENTS:
                self._final_output = list(event["response"].get("output") or ())
                self.is_finished = True
        elif event_type == "response.output_item.added":
            self._items.append(_ItemAccumulator(event["item"]))
        elif event_type == "response.output_item.done":
            self._item(event["item"].get("id")).replace(event["item"])
        elif event_type in _NEW_PART_EVENTS:
            self._item(event.get("item_id")).add_part(_NEW_PART_EVENTS[event_type], event["part"])
        elif event_type in _FINISHED_PART_EVENTS:
            list_name = _FINISHED_PART_EVENTS[event_type]
            self._item(event.get("item_id")).replace_part(list_name, _part_index(event), event["part"])
        elif event_type in _TEXT_EVENTS:
            self._item(event.get("item_id")).append_text(_TEXT_EVENTS[event_type], _part_index(event), event["delta"])
        elif event_type in _ARGUMENT_EVENTS:
            self._item(event.get("item_id")).append_arguments(event["delta"])

    def _item(self, item_id: str | None) -> _ItemAccumulator:
        """Returns the item with this id, or the newest if there is no id; creates one if necessary."""
        for item in reversed(self._items):
            if item_id is None or item.id == item_id:
                return item
        item = _ItemAccumulator({"type": "message", "role": "assistant"} | ({"id": item_id} if item_id else {}))
        self._items.append(item)
        return item

    def reply(self) -> Response:
        """Returns the response so far as a new dict."""
        output = list(self._final_output) or [item.as_dict() for item in self._items]
        return cast("Response", {"object": "response", **self._response, "output": output})


def _part_index(event: Mapping[str, Any]) -> int | None:
    index = event.get("content_index", event.get("summary_index"))
    return index if isinstance(index, int) else None


class _ItemAccumulator:
    """Merges the pieces of one item of the output. Texts are kept in `StringIO` buffers until `as_dict` is called."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.replace(fields)

    @property
    def id(self) -> Any:
        return self._fields.get("id")

    def replace(self, fields: Mapping[str, Any]) -> None:
        lists = {key: [dict(part) for part in fields[key]] for key in ("content", "summary") if fields.get(key)}
        self._fields: dict[str, Any] = {**fields, **lists}

    def add_part(self, list_name: str, part: Mapping[str, Any]) -> None:
        self._part_list(list_name).append(dict(part))

    def replace_part(self, list_name: str, index: int | None, part: Mapping[str, Any]) -> None:
        """Puts a finished part in the place of the one that grew; appends it if there was none."""
        parts = self._part_list(list_name)
        position = len(parts) - 1 if index is None else index
        if 0 <= position < len(parts):
            parts[position] = dict(part)
        else:
            parts.append(dict(part))

    def append_text(self, target: _TextTarget, index: int | None, piece: str) -> None:
        """Appends a piece of text to the part at `index`, or to the newest part."""
        parts = self._part_list(target.list_name)
        position = len(parts) - 1 if index is None else index
        if not 0 <= position < len(parts):
            parts.append({"type": target.part_type})
            position = -1
        _append_piece(parts[position], target.field, piece)

    def append_arguments(self, piece: str) -> None:
        _append_piece(self._fields, "arguments", piece)

    def as_dict(self) -> dict[str, Any]:
        lists = {
            key: [_with_plain_texts(part) for part in self._fields[key]]
            for key in ("content", "summary")
            if self._fields.get(key)
        }
        return {**_with_plain_texts(self._fields), **lists}

    def _part_list(self, list_name: str) -> list[dict[str, Any]]:
        if not self._fields.get(list_name):
            # The list is new, so that the events that the caller holds do not change.
            self._fields[list_name] = []
        return cast("list[dict[str, Any]]", self._fields[list_name])


def _append_piece(fields: dict[str, Any], key: str, piece: str) -> None:
    text = fields.get(key)
    if not isinstance(text, io.StringIO):
        fields[key] = buffer = io.StringIO()
        buffer.write(text or "")
        text = buffer
    text.write(piece)


def _with_plain_texts(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.getvalue() if isinstance(value, io.StringIO) else value for key, value in fields.items()}
