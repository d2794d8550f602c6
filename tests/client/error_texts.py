"""Bodies of errors, and texts that look like errors, as servers and models write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Body = str | Mapping[str, Any] | list[Any]

ALARMING_TEXTS: Final = (
    "CUDA out of memory",
    "model 'x' not found",
    "Loading model",
    "No models loaded. Please load a model",
    "Model unloaded.",
    "The model has crashed without additional information.",
    "This model's maximum context length is 8 tokens",
    "exceed_context_size_error",
    "invalid_api_key",
    "proxy error: Failed to read connection",
    '{"error": {"message": "model crashed", "code": 500}}',
    '{"error": "model crashed"}',
    'data: {"error": "model crashed"}\n\nevent: error\ndata: {"message": "model crashed"}\n\n',
    "error",
    "[DONE]",
    "data: [DONE]\n\n",
)
"""Texts of models and of callers that mention errors but do not report any."""


def openai_error(
    message: str, kind: str | None = "invalid_request_error", code: Any = None, **fields: Any
) -> dict[str, Any]:
    """Returns an error body in the shape of OpenAI's."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **fields}}
