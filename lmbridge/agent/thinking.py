"""Switches the thinking of a model off for one request, with the fields that its kind of server understands.

This is done after a reply that has nothing but reasoning, or whose reasoning did not end before `max_tokens`. A model
that has lost itself in thought usually does so again if it is asked in the same way.

- llama.cpp: `reasoning_effort: "none"`, since mid-2026, and `chat_template_kwargs`, which older versions also pass on
  to the template of the model (tools/server/README.md).
- vLLM: `chat_template_kwargs` (docs.vllm.ai, "Reasoning Outputs").
- Ollama: `reasoning_effort: "none"` (https://docs.ollama.com/api/openai-compatibility).

LM Studio has no such field on `/v1`, and an unknown server might refuse one. With these servers, only the text of the
nudge asks the model to think less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lmbridge.agent.result import NudgeKind

THOUGHT_TOO_LONG: Final[frozenset[NudgeKind]] = frozenset({"only_reasoning", "cut_reasoning"})
"""The flaws of replies after which the model is asked once without thinking."""

_TEMPLATE_FIELD: Final = "chat_template_kwargs"
_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama.cpp": {"reasoning_effort": "none", _TEMPLATE_FIELD: {"enable_thinking": False}},
    "vllm": {_TEMPLATE_FIELD: {"enable_thinking": False}},
    "ollama": {"reasoning_effort": "none"},
}


def can_stop_thinking(server_kind: str | None) -> bool:
    """Returns whether a kind of server has a field that switches the thinking off."""
    return server_kind in _FIELDS


def without_thinking(params: Mapping[str, Any], server_kind: str | None) -> dict[str, Any]:
    """Returns the parameters of a request that asks for an answer without thinking.

    Args:
        params: The parameters of the request. The fields are put into its `extra_body`, and replace those of the same
            name there.
        server_kind: The kind of the server.
    """
    fields = dict(_FIELDS.get(server_kind or "", {}))
    if not fields:
        return dict(params)
    given = params.get("extra_body") or {}
    template = given.get(_TEMPLATE_FIELD)
    if _TEMPLATE_FIELD in fields and isinstance(template, Mapping):
        fields[_TEMPLATE_FIELD] = {**template, **fields[_TEMPLATE_FIELD]}
    return {**params, "extra_body": {**given, **fields}}
