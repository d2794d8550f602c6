"""`ErrorBody`: the body of an error in one shape, whatever its JSON looks like on the server that sent it.

A body may also be hostile, or simply huge. So of a body of more than 50,000 bytes, only the fields that lmbridge needs
are decoded.

Which exception a body becomes, and whether its request is sent again, is decided in `failures`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

import attrs
import msgspec

from lmbridge._text import join_surrogates, redacted_beginning
from lmbridge.client.json_codec import decode_json
from lmbridge.client.text_patterns import TextPatterns

_SEARCHED_CHARACTERS: Final = 10_000
"""The number of characters of a message, from its beginning, that are searched for patterns."""
_SMALL_BODY: Final = 50_000
"""The most bytes of JSON that are decoded as a whole. If there are more, only the fields that lmbridge needs are
decoded."""
_LARGEST_OUTLINE: Final = 16 * 1024 * 1024
"""The most bytes of JSON that are searched for these fields. A larger body is treated as text."""
_LONGEST_ESCAPE: Final = 6
_DEEPEST_MESSAGE: Final = 2
"""How deep the message of a large error may be nested: the number of objects around it, without the outermost one."""
_MOST_ITEMS: Final = 10_000
"""A large list of errors with more items than this is not decoded, because all items would have to be decoded, however
few are shown."""
_ITEMS_SHOWN: Final = 20
"""The number of items of a large list of errors that the message shows."""
_MESSAGE_FIELDS: Final = ("message", "detail", "details")
"""Fields that may hold the message of an error: those of OpenAI, vLLM, FastAPI and their proxies."""

# After such a beginning, a message quotes a part of the request, so the words in it may be the caller's.
_QUOTES_REQUEST: Final = TextPatterns(r"failed to parse\b", r"\d+ validation errors?\b", r"\[\{'type'")
# An HTML page or truncated JSON is not an error message, so the words in it mean nothing.
_HTML_PAGE: Final = TextPatterns(r"\s*<(!doctype|\?xml|html|head|body)\b")
_BROKEN_JSON: Final = TextPatterns(r"\s*(\{|\[\s*[\[{\"])")

_HTTP_STATUS: Final = TextPatterns(r"[1-5]\d\d\Z")

Redact = Callable[[str], str]
"""A function that removes secrets from a text. A server may repeat the key that it refuses."""


def unredacted(text: str) -> str:
    """Returns the text itself. Use it as the `Redact` for a body that is not shown to anyone."""
    return text


@attrs.frozen
class ErrorBody:
    """The body of an error, in one shape for all servers."""

    message: str
    """The error's message, or the whole text if no message was found. A long text is cut after its beginning."""
    text: str
    """The body as it was received, without secrets. A long body is cut after its beginning."""
    type_and_code: str = ""
    """The fields `type` and `code`, separated by a space."""
    code: int | None = None
    """The field `code` if it is an HTTP status, else None."""
    fields: Mapping[str, Any] = attrs.field(factory=dict)
    """The JSON object that holds the message, or an empty one."""
    is_text: bool = False
    """Whether the body is not a JSON object."""
    size: int = 0
    """The size of a large body in bytes, or 0 if the body is small."""

    @property
    def searched_text(self) -> str:
        """The text that the patterns search: message, type and code, or type and code alone.

        The message is left out if it quotes the request or is not an error message at all. Otherwise a word in the
        caller's prompt could decide the class of the error.
        """
        is_broken_json = self.is_text and _BROKEN_JSON.match(self.message)
        if self.quotes_request or self.is_html_page or is_broken_json:
            return self.type_and_code
        return f"{self.searched_message} {self.type_and_code}"

    @property
    def searched_message(self) -> str:
        """The beginning of the message, up to the length that is searched for patterns."""
        return self.message[:_SEARCHED_CHARACTERS]

    @property
    def quotes_request(self) -> bool:
        """Whether the message quotes a part of the request, so that the words in it may be the caller's."""
        return _QUOTES_REQUEST.match(self.message) is not None

    @property
    def is_html_page(self) -> bool:
        """Whether the message is an HTML page."""
        return _HTML_PAGE.match(self.message) is not None


def parse_error_body(body: bytes | str, redact: Redact = unredacted) -> ErrorBody:
    """Parses the body of an error: JSON of any of the known shapes, or plain text.

    Args:
        body: The body, or the data of an event.
        redact: Removes the secrets from everything that the result contains.
    """
    data = body.encode("utf-8", "replace") if isinstance(body, str) else body
    text = redacted_beginning(data, redact)
    stripped = text.removeprefix("\ufeff").strip()
    size = len(data) if len(data) > _SMALL_BODY else 0
    try:
        value = _outline(data) if size else decode_json(data)
    except ValueError:
        return ErrorBody(stripped, text, is_text=True, size=size)
    if not isinstance(value, Mapping):
        message = redacted_beginning(join_surrogates(value.strip()), redact) if isinstance(value, str) else stripped
        return ErrorBody(message, text, is_text=True, size=size)
    error = value.get("error")
    if isinstance(error, str) and error:
        message, fields = error, value
    else:
        fields = error if isinstance(error, Mapping) else value
        fallback = _to_json(error) if isinstance(error, Mapping | list) and error else stripped
        message = next(_messages_in(fields, value), fallback)
    kind, code = _short_text(fields.get("type")), _short_text(fields.get("code"))
    return ErrorBody(
        redacted_beginning(join_surrogates(message), redact),
        text,
        redact(join_surrogates(f"{kind} {code}")),
        int(code) if _HTTP_STATUS.match(code) else None,
        fields,
        size=size,
    )


class _ErrorOutline(msgspec.Struct):
    """The fields of a large JSON object that lmbridge needs. No objects are created for the other fields."""

    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    message: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    detail: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    details: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    type: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    code: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    n_prompt_tokens: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    n_ctx: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _ValidationError(msgspec.Struct, gc=False):
    """An item of FastAPI's list of validation errors without the part of the request that it quotes."""

    loc: msgspec.Raw
    msg: str


def _outline(data: bytes | memoryview, depth: int = 0) -> dict[str, Any]:
    """Returns the fields of a large JSON object that lmbridge needs.

    Raises:
        ValueError: The data is not a JSON object, or too large.
    """
    if len(data) > _LARGEST_OUTLINE:
        raise ValueError("too large")
    try:
        outline = msgspec.json.decode(data, type=_ErrorOutline)
    except RecursionError as exc:
        raise ValueError("too deep") from exc
    fields = ((name, getattr(outline, name)) for name in outline.__struct_fields__)
    return {name: _large_field(memoryview(raw), depth) for name, raw in fields if raw is not msgspec.UNSET}


def _large_field(data: memoryview, depth: int) -> Any:
    """Returns the value of a field of a large JSON object, or a few words in place of a value that is too large."""
    if len(data) <= _SMALL_BODY:
        return decode_json(bytes(data))
    kind = bytes(data[:1])
    if kind == b'"':
        return _beginning_of_string(bytes(data[:_SMALL_BODY]))
    # The bytes of an inner object are read again at each level, so the number of levels is limited.
    if kind == b"{" and depth < _DEEPEST_MESSAGE:
        return _outline(data, depth + 1)
    with suppress(ValueError, RecursionError):
        if kind == b"[" and bytes(data).count(b'"msg"') <= _MOST_ITEMS:
            items = msgspec.json.decode(data, type=list[_ValidationError])
            return decode_json(msgspec.json.encode(items[:_ITEMS_SHOWN]))
    return f"{len(data)} bytes of JSON"


def _beginning_of_string(data: bytes) -> str:
    r"""Returns a large JSON string whose end was cut off, perhaps in the middle of an escape such as `\u00e9`.

    Raises:
        ValueError: The string contains something that is not valid.
    """
    for end in range(len(data), len(data) - _LONGEST_ESCAPE, -1):
        with suppress(ValueError):
            return str(decode_json(data[:end] + b'"'))
    raise ValueError("not a string")


def _messages_in(*objects: Mapping[str, Any]) -> Iterator[str]:
    for value in (fields.get(key) for fields in objects for key in _MESSAGE_FIELDS):
        if isinstance(value, Mapping) and value:
            yield next(_messages_in(value), _to_json(value))
        elif isinstance(value, list) and value:
            yield _to_json([_without_input(item) for item in value])
        elif isinstance(value, str) and value:
            yield value


def _without_input(item: object) -> object:
    """Returns an item of FastAPI's list of validation errors without the part of the request that it quotes."""
    return {key: value for key, value in item.items() if key != "input"} if isinstance(item, Mapping) else item


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short_text(value: object) -> str:
    return str(value)[:100] if isinstance(value, str | int) else ""


def is_error_object(value: Mapping[str, Any]) -> bool:
    """Returns whether a JSON object, of a whole body or of an event, reports an error instead of being a reply."""
    error = value.get("error")
    # The first branch is the fast path: nearly every object is a completion.
    if error is None and "choices" in value and value.get("object") != "error":
        return False
    if error or value.get("object") == "error":
        return True
    if any(key in value for key in ("choices", "data", "output", "models")):
        return False
    if error not in (None, False) or value.get("detail"):
        return True
    return any(isinstance(value.get(key), str) and value[key] for key in _MESSAGE_FIELDS)


def reports_error(data: bytes) -> bool:
    """Returns whether a successful reply's body, or an event, reports an error or is not a JSON object."""
    try:
        value = decode_json(data)
    except ValueError:
        return True
    # llama.cpp sends a null before the first chunk of each of several prompts.
    if value is None:
        return False
    return not isinstance(value, dict) or is_error_object(value)
