"""Events of a streamed response, accumulated into the response that the plain call would have returned.

The last event of such a stream contains the whole response, so a stream that arrives in full would need no
accumulation. It is needed for streams that fail, because their errors carry the response so far as `.partial`. As for
chats, pieces are merged one by one, and only their text is kept; `chat_accumulator` explains why.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from lmbridge._tasks import list_in_slices
from lmbridge._text import join_surrogates, replace_lone_surrogates, shorten
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

    An item is recognized by its id and by its `output_index`. If only the index is known, it decides, because some
    servers give an item another id in each event. If both are known, but belong to different items, the id decides,
    because other servers give all items the same index. Yet other servers leave ids or indices out (llama.cpp leaves
    out all indices). A piece that has neither belongs to the newest item, and to the newest part of it.

    Attributes:
        has_begun: Whether any event was added.
        is_finished: Whether the event that ends the stream was added.
    """

    __slots__ = ("_by_id", "_by_index", "_final_output", "_items", "_response", "has_begun", "is_finished")

    def __init__(self) -> None:
        self.has_begun: bool = False
        self.is_finished: bool = False
        self._response: dict[str, Any] = {}
        self._final_output: list[Any] = []
        self._items: list[_ItemAccumulator] = []
        # The newest item for each id, and for each pair of an id and an index; and the newest item for each index.
        self._by_id: dict[Any, _ItemAccumulator] = {}
        self._by_index: dict[int, _ItemAccumulator] = {}

    @property
    def has_delta(self) -> bool:
        """Whether there was any piece of an answer. A response that is complete without any output counts as well."""
        return self.is_finished or bool(self._items)

    @property
    def has_content(self) -> bool:
        """Whether there was any piece of an answer; for responses, this is the same as `has_delta`."""
        return self.has_delta

    @property
    def has_answer(self) -> bool:
        """Whether there was any piece of an answer; for responses, this is the same as `has_delta`."""
        return self.has_delta

    @property
    def ends_with_text(self) -> bool:
        """Whether the end arrived together with a piece of an answer, which never happens to responses."""
        return False

    @property
    def usage(self) -> Any:
        """The token usage in the last event that had one, or None."""
        return self._response.get("usage")

    def add(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the data of an event, and returns it. Events of an unknown type add nothing.

        Raises:
            LLMStreamError: The event does not have the shape that events of its type have.
        """
        try:
            self._add(str(event.get("type")), event)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            shown = shorten(repr(event), _QUOTED_EVENT_CHARACTERS)
            raise LLMStreamError(f"the stream holds an event of an unknown shape: {shown}", exc) from exc
        return event

    def _add(self, event_type: str, event: Mapping[str, Any]) -> None:
        self.has_begun = True
        if event_type in _EVENTS_WITH_RESPONSE:
            self._response.update(event["response"])
            if event_type in _LAST_EVENTS:
                output = event["response"].get("output") or ()
                self._final_output = [item for item in output if isinstance(item, Mapping)]
                self.is_finished = True
        elif event_type == "response.output_item.added":
            self._begin_item(event)
        elif event_type == "response.output_item.done":
            self._finished_item(event).finish(event["item"])
        elif event_type in _NEW_PART_EVENTS:
            self._item(event).add_part(_NEW_PART_EVENTS[event_type], _part_index(event), event["part"])
        elif event_type in _FINISHED_PART_EVENTS:
            list_name = _FINISHED_PART_EVENTS[event_type]
            self._item(event).replace_part(list_name, _part_index(event), event["part"])
        elif event_type in _TEXT_EVENTS and event["delta"] is not None:
            self._item(event).append_text(_TEXT_EVENTS[event_type], _part_index(event), event["delta"])
        elif event_type in _ARGUMENT_EVENTS and event["delta"] is not None:
            self._item(event).append_arguments(event["delta"])

    def _begin_item(self, event: Mapping[str, Any]) -> None:
        item_id, index = event["item"].get("id"), _output_index(event)
        known = self._find_item(item_id, index)
        if known is not None and not known.is_announced:
            # Pieces of the item have arrived before it was announced.
            known.announce(event["item"])
            self._index(known, item_id, index)
        elif item_id is None or index is None or (item_id, index) not in self._by_id:
            self._register(_ItemAccumulator(event["item"]), item_id, index)

    def _finished_item(self, event: Mapping[str, Any]) -> _ItemAccumulator:
        """Returns the item that an event finishes; creates one if necessary."""
        item_id, index = event["item"].get("id"), _output_index(event)
        found = self._find_item(item_id, index)
        if found is None and index is None and self._items:
            # The id is unknown. If the newest item is of the same type and still open, it is the one that is finished.
            newest = self._items[-1]
            found = None if newest.is_finished or newest.type != event["item"].get("type") else newest
        return found or self._register(_ItemAccumulator({}), item_id, index)

    def _item(self, event: Mapping[str, Any]) -> _ItemAccumulator:
        """Returns the item that a piece belongs to; creates one if necessary."""
        item_id, index = event.get("item_id"), _output_index(event)
        found = self._find_item(item_id, index)
        if found is None and index is None and self._items and not self._items[-1].has_pieces:
            # The id is unknown, so the server has announced the newest item with another id.
            found = self._items[-1]
            self._by_id[item_id] = found
        if found is None:
            fields = {"type": "message", "role": "assistant"} | ({"id": item_id} if item_id else {})
            found = self._register(_ItemAccumulator(fields, is_announced=False), item_id, index)
        found.has_pieces = True
        return found

    def _find_item(self, item_id: Any, index: int | None) -> _ItemAccumulator | None:
        if index is None:
            if item_id is None:
                return self._items[-1] if self._items else None
            return self._by_id.get(item_id)
        found = self._by_id.get((item_id, index)) or self._by_index.get(index)
        known = None if item_id is None else self._by_id.get(item_id)
        if known is not None and (found is None or found.id != item_id):
            # Either this item was announced without an index, or the server gives all items the same index.
            return known if known.index is None or found is not None else None
        return found

    def _register(self, item: _ItemAccumulator, item_id: Any, index: int | None) -> _ItemAccumulator:
        self._items.append(item)
        self._index(item, item_id, index)
        return item

    def _index(self, item: _ItemAccumulator, item_id: Any, index: int | None) -> None:
        """Makes an item the newest one with an id and an index."""
        if item_id is not None:
            self._by_id[item_id] = self._by_id[item_id, index] = item
        if index is not None:
            item.index = index
            self._by_index[index] = item

    def reply(self) -> Response:
        """Returns the response so far as a new dict."""
        output = list(self._final_output) or [item.as_dict() for item in self._items]
        return self._reply(output)

    async def reply_in_slices(self) -> Response:
        """Returns what `reply` returns for a complete response, and lets other tasks run after every 100 items."""
        output = list(self._final_output) or await list_in_slices(item.as_dict() for item in self._items)
        return self._reply(output)

    def _reply(self, output: list[Any]) -> Response:
        return cast("Response", replace_lone_surrogates({"object": "response", **self._response, "output": output}))


def _output_index(event: Mapping[str, Any]) -> int | None:
    index = event.get("output_index")
    return index if isinstance(index, int) else None


def _part_index(event: Mapping[str, Any]) -> int | None:
    index = event.get("content_index", event.get("summary_index"))
    return index if isinstance(index, int) else None


class _ItemAccumulator:
    """Merges the pieces of one item of the output. Texts are kept in `StringIO` buffers until `as_dict` is called."""

    __slots__ = ("_fields", "_positions", "has_pieces", "index", "is_announced", "is_finished")

    def __init__(self, fields: Mapping[str, Any], *, is_announced: bool = True) -> None:
        self.index: int | None = None
        self.is_announced = is_announced
        self._fields: dict[str, Any] = {}
        self.has_pieces = False
        self.is_finished = False
        self._replace(fields)

    @property
    def id(self) -> Any:
        return self._fields.get("id")

    @property
    def type(self) -> Any:
        return self._fields.get("type")

    def announce(self, fields: Mapping[str, Any]) -> None:
        """Adds the fields of the announcement to the pieces that arrived before it."""
        self.is_announced = True
        pieces = {key: self._fields[key] for key in ("content", "summary", "arguments") if self._fields.get(key)}
        self._fields = {**fields, **pieces}

    def finish(self, fields: Mapping[str, Any]) -> None:
        """Puts the finished item in the place of its pieces."""
        self._replace(fields)
        self.is_finished = True

    def _replace(self, fields: Mapping[str, Any]) -> None:
        lists = {key: [dict(part) for part in fields[key]] for key in ("content", "summary") if fields.get(key)}
        self._fields = {**fields, **lists}
        # The positions of the parts, by their list and their index: some servers do not count from 0.
        self._positions: dict[tuple[str, int], int] = {}

    def add_part(self, list_name: str, index: int | None, part: Mapping[str, Any]) -> None:
        parts = self._part_list(list_name)
        parts.append(dict(part))
        if index is not None:
            self._positions[list_name, index] = len(parts) - 1

    def replace_part(self, list_name: str, index: int | None, part: Mapping[str, Any]) -> None:
        """Puts a finished part in the place of the one that grew; appends it if there was none."""
        position = self._position(list_name, index)
        if position is None:
            self.add_part(list_name, index, part)
        else:
            self._part_list(list_name)[position] = dict(part)

    def append_text(self, target: _TextTarget, index: int | None, piece: str) -> None:
        """Appends a piece of text to the part at `index`, or to the newest part."""
        position = self._position(target.list_name, index)
        if position is None:
            self.add_part(target.list_name, index, {"type": target.part_type})
            position = -1
        _append_piece(self._part_list(target.list_name)[position], target.field, piece)

    def append_arguments(self, piece: str) -> None:
        _append_piece(self._fields, "arguments", piece)

    def as_dict(self) -> dict[str, Any]:
        lists = {
            key: [_with_plain_texts(part) for part in self._fields[key]]
            for key in ("content", "summary")
            if self._fields.get(key)
        }
        return {**_with_plain_texts(self._fields), **lists}

    def _position(self, list_name: str, index: int | None) -> int | None:
        """Returns the position of a part in its list, or None if it is not there."""
        count = len(self._part_list(list_name))
        if index is None:
            return count - 1 if count else None
        return self._positions.get((list_name, index), index if 0 <= index < count else None)

    def _part_list(self, list_name: str) -> list[dict[str, Any]]:
        if not self._fields.get(list_name):
            # This creates a new list, so that the events that the caller holds do not change.
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
    return {
        key: join_surrogates(value.getvalue()) if isinstance(value, io.StringIO) else value
        for key, value in fields.items()
    }
