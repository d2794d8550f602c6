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
    """The kind of model: "llm" or "embedding"."""
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
    """The longest context that the model supports, in tokens. A loaded instance may have less; see its `config`."""
    format: str | None
    """The format of the model file, such as "gguf" or "mlx"."""
    capabilities: dict[str, Any]
    """What the model can do: `vision` and `trained_for_tool_use`."""
    description: str | None
    """A description of the model for people; None if it has none."""
    variants: list[str]
    """The names of the variants of the model that are downloaded, such as its quantizations."""
    selected_variant: str
    """The name of the variant that is loaded when the model is requested."""


class LMStudioLoad(TypedDict, total=False):
    """LM Studio's answer after it has loaded a model."""

    type: str
    """The kind of model: "llm" or "embedding"."""
    instance_id: Required[str]
    """The id of the new instance. Use it as the name of the model in requests, and pass it to `unload`."""
    load_time_seconds: float
    """The seconds that loading took."""
    status: str
    """The state of the instance, which is "loaded"."""
    load_config: dict[str, Any]
    """The whole configuration. It is sent only if the request had `echo_load_config`."""


class LMStudioUnload(TypedDict, total=False):
    """LM Studio's answer after it has unloaded an instance."""

    instance_id: Required[str]
    """The id of the instance that was unloaded."""


class DownloadStatus(TypedDict, total=False):
    """The progress of one of LM Studio's downloads."""

    job_id: str
    """The id of the download; it is missing if the model had already been downloaded."""
    status: Required[str]
    """The state of the download: "downloading", "paused", "completed", "failed" or "already_downloaded"."""
    total_size_bytes: int
    """The size of the whole download in bytes."""
    downloaded_bytes: int
    """The number of bytes that have arrived."""
    bytes_per_second: float
    """The current speed of the download."""
    started_at: str
    """The time at which the download began, in ISO 8601."""
    estimated_completion: str
    """The time at which LM Studio expects the download to be complete, in ISO 8601."""
    completed_at: str
    """The time at which the download was complete, in ISO 8601."""
