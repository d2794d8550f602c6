"""Progress in chunks and events: of llama.cpp as recorded, and of LM Studio and the router as documented."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import ModelLoading, PromptProgress, progress_of


def test_a_chunk_of_llama_cpp_reports_the_tokens_of_the_prompt() -> None:
    chunk = {"choices": [], "prompt_progress": {"total": 721, "cache": 209, "processed": 465, "time_ms": 16255}}
    progress = progress_of(chunk)
    assert progress == PromptProgress(processed=465, total=721, cached=209)
    assert progress is not None
    assert progress.fraction == 0.5
    assert PromptProgress(processed=5, total=5, cached=5).fraction == 1.0


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"type": "model_load.start", "model_instance_id": "gpt"}, ModelLoading("gpt", None)),
        ({"type": "model_load.progress", "model_instance_id": "gpt", "progress": 0.65}, ModelLoading("gpt", 0.65)),
        ({"type": "model_load.end", "model_instance_id": "gpt", "load_time_seconds": 12.3}, ModelLoading("gpt", 1.0)),
        ({"model": "m", "event": "model_status", "data": {"status": "loading"}}, ModelLoading("m", None)),
        ({"model": "m", "event": "model_status", "data": {"status": "loaded", "info": {}}}, ModelLoading("m", 1.0)),
        (
            {"model": "m", "event": "status_change", "data": {"status": "loading", "progress": {
                "stages": ["text_model", "mmproj_model"], "current": "mmproj_model", "value": 0.5}}},
            ModelLoading("m", 0.75),
        ),
    ],
)  # fmt: skip
def test_events_report_that_a_model_is_loaded(event: dict[str, Any], expected: ModelLoading) -> None:
    assert progress_of(event) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"choices": []},
        {"prompt_progress": None},
        {"prompt_progress": {"total": "many"}},
        {"model": "m", "event": "model_remove"},
        {"model": "m", "data": {"status": "sleeping"}},
        None,
        "text",
    ],
)
def test_everything_else_is_no_progress(value: Any) -> None:
    assert progress_of(value) is None
