"""`ProgressReporter`: reports how far a prompt has been processed, and that a model is being loaded.

Progress is requested only if the run has a listener and the server is known to report progress. Another server might
refuse the field, and without a listener the additional chunks would only cost time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from lmbridge.agent.channel import Channel
from lmbridge.agent.events import RunEvent
from lmbridge.agent.source import ClientSource
from lmbridge.client.progress import ModelLoading, PromptProgress, progress_of
from lmbridge.errors import LLMError

logger: logging.Logger = logging.getLogger("lmbridge.agent")


class ProgressReporter:
    """Sends the events about the progress of one run.

    Args:
        source: What is known of the server.
        channel: Carries the events of the run.
        model: The model of the run.
    """

    def __init__(self, source: ClientSource, channel: Channel[RunEvent], model: str | None) -> None:
        self._source = source
        self._channel = channel
        self._model = model

    def params(self) -> dict[str, Any]:
        """Returns the parameters of a request that make the server report its progress."""
        if self._channel.has_listener and self._source.server_kinds.get(self._model) == "llama.cpp":
            return {"return_progress": True}
        return {}

    async def report(self, chunk: Mapping[str, Any]) -> None:
        """Sends an event with the progress of the prompt, if a chunk reports it."""
        if "prompt_progress" in chunk and self._channel.has_listener:
            progress = progress_of(chunk)
            if isinstance(progress, PromptProgress):
                await self._channel.put(progress)

    def watch_loading(self, client: Any) -> asyncio.Task[None] | None:
        """Starts a task that reports how the model is being loaded, if the model is known not to be loaded yet.

        Args:
            client: The client that is about to send a request to the model.

        Returns:
            The task, which the caller has to cancel; None if there is nothing to report.
        """
        if not self._channel.has_listener or self._model not in self._source.unloaded_models:
            return None
        self._source.unloaded_models.discard(self._model)
        return asyncio.create_task(self._report_loading(client))

    async def _report_loading(self, client: Any) -> None:
        await self._channel.put(ModelLoading(self._model, None))
        if self._source.server_kinds.get(self._model) != "llama.cpp" or not hasattr(type(client), "models"):
            return
        last: float | None = None
        try:
            async for loading in client.models.loading(self._model):
                # The router of llama.cpp reports the same fraction several times.
                if loading.fraction not in (None, last):
                    last = loading.fraction
                    await self._channel.put(loading)
        except LLMError as error:
            # The model is still being loaded. If that fails, the request that needs the model reports the error.
            logger.debug("the progress of loading %r is unknown: %s", self._model, error)
