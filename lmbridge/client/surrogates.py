r"""Characters that a server cuts in two: a surrogate pair whose halves are escaped in two events of a stream.

A server that escapes each token separately may send an emoji as "\ud83d" in one event and "\ude42" in the next.
Neither half is a character, so a program that prints or stores a chunk would fail. Therefore a half at the end of a
piece is held back, and put in front of the next piece of the same text. The accumulators join such halves as well, when
they return the reply so far, because streams of other clients reach them without this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from lmbridge._text import has_lone_surrogates, join_surrogates, replace_lone_surrogates

Halves: TypeAlias = dict[tuple[Any, ...], str]
"""The halves that a stream has held back, by the text that they belong to. The dict is nearly always empty."""

_BACKSLASH: Final = ord("\\")
_REPLACEMENT: Final = "?"
"""The text that replaces a half whose other half never arrived."""
_EVENT_KEYS: Final = ("type", "item_id", "output_index", "content_index", "summary_index")
"""The fields by which the texts in a streamed response differ."""
_OF_EVENT: Final = "event"
"""The first key of the path of a text in an event of a response. In a chunk, the first key is the index of a choice."""


def may_hold_surrogates(data: bytes) -> bool:
    """Returns whether a JSON text has the escape of a surrogate."""
    # A single byte, given as a number, is found much faster than a longer pattern, and most texts have no escapes.
    return _BACKSLASH in data and (b"\\ud" in data or b"\\uD" in data)


def join_halves(event: Mapping[str, Any], halves: Halves) -> Mapping[str, Any]:
    """Returns an event whose pieces of text have only whole characters; the event itself is not changed.

    Args:
        event: A chunk of a completion, or an event of a response.
        halves: What was held back before. The function updates it.
    """
    if not halves and not has_lone_surrogates(event):
        # The escapes in the event are those of whole characters.
        return event
    if isinstance(choices := event.get("choices"), list):
        others = replace_lone_surrogates({key: value for key, value in event.items() if key != "choices"})
        joined = [_join_in_choice(choice, halves) for choice in choices]
        return {key: joined if key == "choices" else others[key] for key in event}
    if isinstance(delta := event.get("delta"), str):
        values = [event.get(key) for key in _EVENT_KEYS]
        path = (_OF_EVENT, *(value if isinstance(value, str | int) else None for value in values))
        event = {**event, "delta": _join(delta, path, halves)}
    return replace_lone_surrogates(event)


def rest_of_halves(halves: Halves) -> dict[str, Any] | None:
    """Returns the last piece of a stream that has ended: the replacements of the halves that it still holds back.

    Halves in calls are left out, as they are in a chunk with a finish reason.

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


def _join_in_choice(choice: dict[str, Any], halves: Halves) -> dict[str, Any]:
    index = choice.get("index") or 0
    joined = {
        key: _join_in(value, (index, key), halves) if key in ("delta", "text") else replace_lone_surrogates(value)
        for key, value in choice.items()
    }
    if choice.get("finish_reason"):
        for path in [path for path in halves if path[0] == index]:
            del halves[path]
            _append(joined, path[1:], _REPLACEMENT)
    return joined


def _join_in(value: Any, path: tuple[Any, ...], halves: Halves) -> Any:
    if isinstance(value, str):
        return _join(value, path, halves)
    if isinstance(value, dict):
        return {key: _join_in(each, (*path, key), halves) for key, each in value.items()}
    if isinstance(value, list):
        return [_join_in(each, (*path, _place(each, number)), halves) for number, each in enumerate(value)]
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

    If the path leads through a list, nothing is changed, because the items of the list may be other ones by now. Nor is
    anything changed if the path leads through a value that is not a dict.
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
