"""The number of tokens in a reply, for the line that the transport writes to the log about each request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lmbridge.client.json_codec import decode_json
from lmbridge.transport import TokenUsage


class _HasUsage(Protocol):
    """An accumulator, of which only the usage is needed."""

    @property
    def usage(self) -> Any: ...


def usage_in_body(body: bytes) -> TokenUsage | None:
    """Returns the number of tokens that a JSON body reports; None if it reports none."""
    try:
        reply = decode_json(body)
    except ValueError:
        return None
    return usage_in_reply(reply) if isinstance(reply, Mapping) else None


def usage_in_stream(accumulator: _HasUsage) -> TokenUsage | None:
    """Returns the number of tokens that the chunks of a stream have reported so far."""
    return _token_usage(accumulator.usage)


def usage_in_reply(reply: Mapping[str, Any]) -> TokenUsage | None:
    """Returns the number of tokens that a reply reports, under the names of chat completions or of responses."""
    return _token_usage(reply.get("usage"))


def _token_usage(usage: object) -> TokenUsage | None:
    if not isinstance(usage, Mapping):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens", 0))
    return TokenUsage(prompt, completion) if isinstance(prompt, int) and isinstance(completion, int) else None
