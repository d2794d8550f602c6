"""Recognizes conversations, so that a request goes to the server that has read the beginning of its prompt before.

For a while, a server keeps the prompts that it has processed in a cache. The next request of a conversation repeats the
whole conversation, so this server has to read only the new end. The pool therefore remembers which server has answered
each conversation last.

A conversation is recognized by the bytes of its leading messages. The alternative, an id that the caller passes, would
not be known to a gateway, and would be wrong as soon as a conversation is trimmed or branches. The JSON is not decoded
for this: msgspec skips over the messages, and each of them is hashed once.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Final, Generic, TypeVar

import attrs
import msgspec

_T = TypeVar("_T")

_KEY_BYTES: Final = 16
_TEXT_BLOCK: Final = 1024
"""The size of a block in bytes. A prompt that is a single string has a key for each of its whole blocks."""
MOST_CONVERSATIONS: Final = 10_000
"""The most conversations that are remembered. Each takes one short key."""


class _PromptFields(msgspec.Struct):
    """The fields of a request that the prompt is made of, in all APIs."""

    model: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    previous_response_id: str | None = None


@attrs.frozen
class SentConversation:
    """The conversation that a request continues, in a form in which it can be recognized."""

    keys: tuple[bytes, ...] = ()
    """A key for each beginning of the conversation; the last one stands for the whole of it."""
    previous_response_id: str | None = None
    """The id of the stored response that the request continues. Only the server that created the response has it."""


def conversation_in(body: bytes | None) -> SentConversation:
    """Returns the conversation in the JSON body of a request. A body without one has no keys.

    It reads `messages` (chat completions, and Anthropic's API), `prompt` (completions) and `input` (responses). The
    model, the tools and the system prompt are a part of each key, because the prompt begins with them.
    """
    if not body:
        return SentConversation()
    try:
        fields = msgspec.json.decode(body, type=_PromptFields)
        parts = _parts_of(fields)
    except (msgspec.DecodeError, RecursionError):
        return SentConversation()
    digest = blake2b(digest_size=_KEY_BYTES)
    for head in (fields.model, fields.tools, fields.system, fields.instructions):
        _add(digest, bytes(head))
    keys = []
    for part in parts:
        _add(digest, part)
        keys.append(digest.digest())
    return SentConversation(tuple(keys), fields.previous_response_id)


def response_key(response_id: str) -> bytes:
    """Returns the key under which the server of a stored response is remembered."""
    return blake2b(response_id.encode("utf-8", "replace"), digest_size=_KEY_BYTES, person=b"response").digest()


def _parts_of(fields: _PromptFields) -> list[bytes]:
    raw = next((bytes(each) for each in (fields.messages, fields.input, fields.prompt) if bytes(each)), b"")
    if raw[:1] == b"[":
        return [bytes(each) for each in msgspec.json.decode(raw, type=list[msgspec.Raw])]
    if raw[:1] == b'"':
        return [raw[end - _TEXT_BLOCK : end] for end in range(_TEXT_BLOCK, len(raw) + 1, _TEXT_BLOCK)]
    return []


def _add(digest: blake2b, part: bytes) -> None:
    # The length keeps two parts apart from one that is their concatenation.
    digest.update(len(part).to_bytes(8, "big"))
    digest.update(part)


class WarmPrefixes(Generic[_T]):
    """Remembers which server answered each conversation last. The least recently used conversation is forgotten first.

    Args:
        most: The most conversations that are remembered.
    """

    def __init__(self, most: int = MOST_CONVERSATIONS) -> None:
        self._most = most
        self._entries: OrderedDict[bytes, _T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: tuple[bytes, ...]) -> _T | None:
        """Returns what is remembered for the longest known beginning of a conversation, or None."""
        for key in reversed(keys):
            if (entry := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                return entry
        return None

    def remember(self, key: bytes, entry: _T) -> None:
        """Remembers an entry, such as the server that has answered, for a conversation."""
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)
