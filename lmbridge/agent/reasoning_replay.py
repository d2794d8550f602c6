"""Decides how a model's reasoning is sent back to it, and recognizes servers that demand it.

Most servers ignore reasoning in the messages that they get, and some refuse it (Groq: "property 'reasoning_content' is
unsupported"). DeepSeek, Kimi and MiMo refuse the messages of a run with tools if it is missing. A list of models would
be out of date at once, so the server's own refusal decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from lmbridge.errors import LLMError

DEFAULT_FIELD: Final = "reasoning_content"
"""The field for reasoning that arrived within the text, and not in a separate field."""
_FIELDS: Final = (DEFAULT_FIELD, "reasoning")
"""The fields of a message in which servers send reasoning: llama.cpp, LM Studio and DeepSeek use the first of them, and
vLLM and Ollama the second."""
_MOST_CHARACTERS: Final = 5_000
"""How many characters of an error are searched for a demand."""
_DEMAND: Final = re.compile(
    r"\bmust (?:be|have|contain|include)\b|\bpass(?:ed)? (?:it |them )?back\b|\bmissing\b|\brequire[sd]?\b"
    r"|必须|缺少|回传"
)
"""Words with which servers demand a field.

DeepSeek and MiMo write "The `reasoning_content` in the thinking mode must be passed back to the API"; an older DeepSeek
"Missing `reasoning_content` field in the assistant message at message index 2"; and Kimi "thinking is enabled but
reasoning_content is missing in assistant tool call message at index 7".
"""
_REFUSAL: Final = re.compile(
    r"\bunsupported\b|\bnot (?:be|support|permit|allow|accept|recogni)|\bunknown\b|\bunrecogni|\bunexpected\b|\bextra\b"
)
"""Words with which servers refuse a field."""


def reasoning_fields(message: Mapping[str, Any], reasoning: str) -> dict[str, str]:
    """Returns the fields that send the reasoning of a message back, under the name that the server used.

    Args:
        message: The message of a reply.
        reasoning: Its reasoning; an empty one has no fields.
    """
    if not reasoning:
        return {}
    field = next((name for name in _FIELDS if isinstance(message.get(name), str) and message[name]), DEFAULT_FIELD)
    return {field: reasoning}


def demanded_field(error: LLMError) -> str | None:
    """Returns the field of messages whose absence made a server refuse a request, or None for any other error."""
    text = f"{error.message} {error.body or ''}"[:_MOST_CHARACTERS].lower()
    field = next((name for name in _FIELDS if re.search(rf"\b{name}\b", text)), None)
    return field if field and _DEMAND.search(text) and not _REFUSAL.search(text) else None
