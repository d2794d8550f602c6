r"""Characters that a server cuts in two: a surrogate pair whose halves are escaped in two events of a stream.

A server that escapes each token separately may send an emoji as "\ud83d" in one event and "\ude42" in the next.
Neither half is a character, so a program that prints or stores a chunk would fail. Therefore a half at the end of a
piece is held back, and put in front of the next piece of the same text. The accumulators join such halves as well, when
they return the reply so far, because streams of other clients reach them without this module.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import count
from typing import Any, Final, TypeAlias, TypeVar

from lmbridge._tasks import ITEMS_PER_STEP, run_at_once
from lmbridge._text import has_lone_surrogates, join_surrogates, replace_lone_surrogates

Halves: TypeAlias = dict[tuple[Any, ...], str]
"""The halves that a stream has held back, by the text that they belong to. The dict is nearly always empty."""

_T = TypeVar("_T")

_DEEPEST_IN_SLICES: Final = 100
"""The number of nested lists and dicts whose values are processed one by one, with pauses for other tasks. A value that
is nested more deeply is processed in one step."""
_BACKSLASH: Final = ord("\\")
_REPLACEMENT: Final = "?"
"""The text that replaces a half whose other half never arrived."""
_EVENT_KEYS: Final = ("type", "item_id", "output_index", "content_index", "summary_index")
"""The fields that show which text of a streamed response a piece belongs to."""
_OF_EVENT: Final = "event"
"""The first key of the path of a text in an event of a response. In a chunk, the first key is the index of a choice."""


def may_hold_surrogates(data: bytes) -> bool:
    """Returns whether a JSON text has the escape of a surrogate."""
    # A single byte, given as a number, is found much faster than a longer pattern, and most texts have no escapes.
    return _BACKSLASH in data and (b"\\ud" in data or b"\\uD" in data)


def join_halves(event: Mapping[str, Any], halves: Halves) -> Mapping[str, Any]:
    """Does what `join_halves_in_slices` does, at once."""
    return run_at_once(join_halves_in_slices(event, halves))


def join_halves_in_slices(event: Mapping[str, Any], halves: Halves) -> Generator[None, None, Mapping[str, Any]]:
    """Returns an event whose pieces of text have only whole characters; the event itself is not changed.

    It is a generator that yields after every 100 values in the event.

    Args:
        event: A chunk of a completion, or an event of a response.
        halves: What was held back before. The function updates it.
    """
    if not halves and not has_lone_surrogates(event):
        # The escapes in the event are those of whole characters.
        return event
    if isinstance(choices := event.get("choices"), list):
        others = yield from replace_surrogates_in_slices({**event, "choices": None})
        joined, number = list(choices), count(1)
        for place, choice in enumerate(choices):
            joined[place] = yield from _join_in_choice(choice, halves, number)
        return {**others, "choices": joined}
    if isinstance(delta := event.get("delta"), str):
        values = [event.get(key) for key in _EVENT_KEYS]
        path = (_OF_EVENT, *(value if isinstance(value, str | int) else None for value in values))
        event = {**event, "delta": _join(delta, path, halves)}
    return (yield from replace_surrogates_in_slices(event))


def replace_surrogates_in_slices(value: _T) -> Generator[None, None, _T]:
    """Does what `replace_lone_surrogates` does, as a generator that yields after every 100 values."""
    if not has_lone_surrogates(value):
        return value
    return (yield from _replace_in(value, count(1)))  # type: ignore[no-any-return]  # it is of the same type


def _replace_in(value: Any, number: Iterator[int], depth: int = 0) -> Generator[None, None, Any]:
    if next(number) % ITEMS_PER_STEP == 0:
        yield
    if isinstance(value, str):
        return join_surrogates(value)
    if depth > _DEEPEST_IN_SLICES:
        return replace_lone_surrogates(value)
    if isinstance(value, dict):
        fields: dict[Any, Any] = {}
        for key, each in value.items():
            fields[join_surrogates(key)] = yield from _replace_in(each, number, depth + 1)
        return fields
    if isinstance(value, list):
        items = list(value)
        for place, each in enumerate(value):
            items[place] = yield from _replace_in(each, number, depth + 1)
        return items
    return value


def rest_of_halves(halves: Halves) -> dict[str, Any] | None:
    """Returns the last piece of a stream that has ended: the replacements of the halves that it still holds back.

    Halves in tool calls are left out, as they are in a chunk with a finish reason.

    Args:
        halves: What was held back. What the piece replaces is removed, so further calls return further pieces.

    Returns:
        A chunk, or an event of a response; None if nothing is left.
    """
    choices: dict[Any, dict[str, Any]] = {}
    for path in halves:
        if path[0] == _OF_EVENT:
            # An event has one text, while a chunk has those of all answers.
            del halves[path]
            event = {key: value for key, value in zip(_EVENT_KEYS, path[1:], strict=True) if value is not None}
            return {**event, "delta": _REPLACEMENT}
        if all(isinstance(key, str) for key in path[1:]):
            _append(choices.setdefault(path[0], {"index": path[0]}), path[1:], _REPLACEMENT)
    halves.clear()
    return {"choices": list(choices.values())} if choices else None


def _join_in_choice(
    choice: dict[str, Any], halves: Halves, number: Iterator[int]
) -> Generator[None, None, dict[str, Any]]:
    index = choice.get("index") or 0
    joined: dict[str, Any] = {}
    for key, value in choice.items():
        if key in ("delta", "text"):
            joined[key] = yield from _join_in(value, (index, key), halves, number)
        else:
            joined[key] = yield from replace_surrogates_in_slices(value)
    if choice.get("finish_reason"):
        for path in [path for path in halves if path[0] == index]:
            del halves[path]
            _append(joined, path[1:], _REPLACEMENT)
    return joined


def _join_in(value: Any, path: tuple[Any, ...], halves: Halves, number: Iterator[int]) -> Generator[None, None, Any]:
    if next(number) % ITEMS_PER_STEP == 0:
        yield
    if isinstance(value, str):
        return _join(value, path, halves)
    if isinstance(value, dict):
        fields: dict[str, Any] = {}
        for key, each in value.items():
            fields[key] = yield from _join_in(each, (*path, key), halves, number)
        return fields
    if isinstance(value, list):
        items = list(value)
        for place, each in enumerate(value):
            items[place] = yield from _join_in(each, (*path, _place(each, place)), halves, number)
        return items
    return value


def _place(item: object, number: int) -> tuple[str, int]:
    index = item.get("index") if isinstance(item, dict) else None
    return ("index", index if isinstance(index, int) else number)


def _join(text: str, path: tuple[Any, ...], halves: Halves) -> str:
    if path in halves:
        if not text:
            return text
        text = halves.pop(path) + text
    if text and "\ud800" <= text[-1] <= "\udbff":
        halves[path] = text[-1]
        text = text[:-1]
    return join_surrogates(text)


def _append(fields: dict[str, Any], path: tuple[Any, ...], text: str) -> None:
    """Appends a text to the one at a path of keys, and creates the dicts on the way that do not exist.

    Nothing is changed if the path leads through a list, because the items of the list may have changed in the meantime,
    or through another value that is not a dict.
    """
    if not all(isinstance(key, str) for key in path):
        return
    *parents, last = path
    for key in parents:
        if fields.get(key) is None:
            fields[key] = {}
        if not isinstance(fields[key], dict):
            return
        fields = fields[key]
    if isinstance(fields.get(last), str | None):
        fields[last] = (fields.get(last) or "") + text
