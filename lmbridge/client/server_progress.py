"""Progress that servers report before an answer: how far the prompt is processed, or how far the model is loaded.

- llama.cpp: chunks with `prompt_progress` if the request has `return_progress: true` (section about `/completion` in
  tools/server/README.md). The first one has the number of tokens that come from the prompt cache.
- llama.cpp's router: events of `GET /models/sse` while a model is loaded (the same page, "Using multiple models").
- LM Studio: `model_load.progress` of `POST /api/v1/chat` (https://lmstudio.ai/docs/developer/rest/streaming-events).
  Its `prompt_processing.progress` names a fraction and no tokens, so it cannot become a `PromptProgress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from lmbridge._checks import is_integer, is_number


@attrs.frozen
class PromptProgress:
    """How far the server is with a prompt. No text can arrive before the whole prompt is processed."""

    processed: int
    """How many tokens of the prompt are done, those from the prompt cache included."""
    total: int
    """How many tokens the prompt has."""
    cached: int
    """How many tokens come from the server's prompt cache, so that they took no time."""

    @property
    def fraction(self) -> float:
        """How much of the work is done, from 0 to 1. Tokens from the cache do not count as work."""
        work = self.total - self.cached
        return 1.0 if work <= 0 else min(1.0, max(0.0, (self.processed - self.cached) / work))


@attrs.frozen
class ModelLoading:
    """The server is loading a model. No answer can arrive before the model is loaded."""

    model: str | None
    """The model, or None if it is not known."""
    fraction: float | None
    """How much of the model has been loaded, from 0 to 1; None if the server does not say."""


def reports_progress(data: bytes) -> bool:
    """Returns whether the data of an event is the progress of a prompt."""
    # The same words in the text of an answer do not match, because the quotation marks are escaped there.
    return b'"prompt_progress"' in data


def progress_of(value: Any) -> PromptProgress | ModelLoading | None:
    """Returns the progress that a chunk of a stream, or an event of a server, reports; None if it reports none.

    For example::

        async with client.stream_chat(messages, extra_body={"return_progress": True}) as stream:
            async for chunk in stream:
                if (progress := progress_of(chunk)) is not None:
                    print(f"{progress.fraction:.0%}")
    """
    if not isinstance(value, Mapping):
        return None
    if "prompt_progress" in value:
        return _prompt_progress(value["prompt_progress"])
    if value.get("type") in ("model_load.start", "model_load.progress", "model_load.end"):
        return _loading_of_lm_studio(value)
    return _loading_of_router(value)


def _prompt_progress(fields: Any) -> PromptProgress | None:
    if not isinstance(fields, Mapping):
        return None
    processed, total, cached = fields.get("processed"), fields.get("total"), fields.get("cache", 0)
    if not (is_integer(processed) and is_integer(total) and is_integer(cached)):
        return None
    return PromptProgress(processed=processed, total=total, cached=cached)


def _loading_of_lm_studio(event: Mapping[str, Any]) -> ModelLoading:
    fraction = 1.0 if event["type"] == "model_load.end" else event.get("progress")
    return ModelLoading(_text(event.get("model_instance_id")), float(fraction) if is_number(fraction) else None)


def _loading_of_router(event: Mapping[str, Any]) -> ModelLoading | None:
    """Reads an event of `/models/sse`. A load has stages, such as the text model and the image projector."""
    data = event.get("data")
    if not isinstance(data, Mapping) or data.get("status") not in ("loading", "loaded"):
        return None
    model, progress = _text(event.get("model")), data.get("progress")
    if data["status"] == "loaded":
        return ModelLoading(model, 1.0)
    if not isinstance(progress, Mapping) or not is_number(progress.get("value")):
        return ModelLoading(model, None)
    stages, current = progress.get("stages"), progress.get("current")
    count, before = 1, 0
    if isinstance(stages, list) and current in stages:
        count, before = len(stages), stages.index(current)
    return ModelLoading(model, min(1.0, max(0.0, float((before + progress["value"]) / count))))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
