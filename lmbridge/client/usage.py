"""The number of tokens in a reply, for the line that the transport writes to the log about each request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from lmbridge._checks import MAPPING_TYPES
from lmbridge.client.json_codec import decode_json
from lmbridge.transport import TokenUsage


class _HasUsage(Protocol):
    """The part of an accumulator that this module needs."""

    @property
    def usage(self) -> Any: ...


class _UsageField(msgspec.Struct):
    """The only field of a reply that is decoded here. No objects are created for the others, which may be large."""

    usage: Any = None


_decode_usage = msgspec.json.Decoder(_UsageField).decode


def usage_in_body(body: bytes) -> TokenUsage | None:
    """Returns the number of tokens that a JSON body reports; None if it reports none."""
    try:
        return _token_usage(_decode_usage(body).usage)
    except (ValueError, RecursionError):
        # The body is not an object, or not strict JSON.
        pass
    try:
        reply = decode_json(body)
    except ValueError:
        return None
    return usage_in_reply(reply) if isinstance(reply, Mapping) else None


class StreamUsage:
    """A function that returns the number of tokens that the chunks of a stream have reported so far.

    Each open stream has one. Therefore this is a class with a slot, which takes a third of the memory of a
    `functools.partial`.

    Args:
        accumulator: The accumulator of the chunks.
    """

    __slots__ = ("_accumulator",)

    def __init__(self, accumulator: _HasUsage) -> None:
        self._accumulator = accumulator

    def __call__(self) -> TokenUsage | None:
        """Returns the numbers so far, or None."""
        return _token_usage(self._accumulator.usage)


def usage_in_reply(reply: Mapping[str, Any]) -> TokenUsage | None:
    """Returns the number of tokens that a reply reports, under the names of chat completions or of responses."""
    return _token_usage(reply.get("usage"))


def _token_usage(usage: object) -> TokenUsage | None:
    if not isinstance(usage, MAPPING_TYPES):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    return TokenUsage(prompt, completion, cached_tokens(usage))


def cached_tokens(usage: Mapping[str, Any] | None) -> int | None:
    """Returns how many tokens of the prompt came from the server's cache; None if the server does not say."""
    counts = usage or {}
    details = counts.get("prompt_tokens_details", counts.get("input_tokens_details"))
    if details is None or not isinstance(details, MAPPING_TYPES):
        return None
    cached = details.get("cached_tokens")
    return cached if isinstance(cached, int) and not isinstance(cached, bool) else None
