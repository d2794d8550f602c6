"""The replies of LM Studio's own API.

The annotations are evaluated (there is no `from __future__ import annotations` here), because a TypedDict whose
annotations are strings does not know at run time which of its fields are required.
"""

from typing import Any, Required, TypedDict


class LMStudioInstance(TypedDict, total=False):
    """A loaded instance of one of LM Studio's models."""

    id: str
    """The id of the instance. Pass it to unload the instance."""
    config: dict[str, Any]
    """The configuration of the instance: `context_length`, and for a language model also `parallel` and others."""


class LMStudioModel(TypedDict, total=False):
    """One of LM Studio's downloaded models (`/api/v1/models`)."""

    type: str
    """Either "llm" or "embedding"."""
    key: Required[str]
    """The name by which the model is loaded."""
    publisher: str
    """The publisher of the model."""
    display_name: str
    """The name of the model for people."""
    architecture: str | None
    """The architecture of the model, such as "qwen3"."""
    quantization: dict[str, Any] | None
    """The quantization of the weights: its name and its bits per weight."""
    size_bytes: int
    """The size of the model file in bytes."""
    params_string: str | None
    """The number of parameters as text, such as "4B"."""
    loaded_instances: Required[list[LMStudioInstance]]
    """The loaded instances. The list is empty if the model is not loaded."""
    max_context_length: int
    """The most tokens of context that the model supports. A loaded instance may have fewer; see its `config`."""
    format: str | None
    capabilities: dict[str, Any]
    description: str | None
    variants: list[str]
    selected_variant: str


class LMStudioLoad(TypedDict, total=False):
    """LM Studio's answer after it has loaded a model."""

    type: str
    instance_id: Required[str]
    load_time_seconds: float
    status: str
    load_config: dict[str, Any]
    """The whole configuration. It is sent only if the request had `echo_load_config`."""


class LMStudioUnload(TypedDict, total=False):
    """LM Studio's answer after it has unloaded an instance."""

    instance_id: Required[str]


class DownloadStatus(TypedDict, total=False):
    """The progress of one of LM Studio's downloads."""

    job_id: str
    status: Required[str]
    """One of "downloading", "paused", "completed", "failed" and "already_downloaded"."""
    total_size_bytes: int
    downloaded_bytes: int
    bytes_per_second: float
    started_at: str
    estimated_completion: str
    completed_at: str
