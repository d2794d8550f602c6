"""`ProgressReporter`: reports how far a prompt has been processed, and that a model is being loaded.

Progress is requested only if the run has a listener or observers, and the server is known to report progress. Another
server might refuse the field, and without a reader, the additional chunks would only cost time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from lmbridge.agent.channel import Channel
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.events import RunEvent
from lmbridge.client.server_progress import ModelLoading, PromptProgress, progress_of
from lmbridge.errors import LLMError
from lmbridge.observe.watches import RunWatch

logger: logging.Logger = logging.getLogger("lmbridge.agent")


class ProgressReporter:
    """Sends the events about the progress of one run.

    Args:
        source: What is known of the server.
        channel: Carries the events of the run.
        model: The model of the run.
        watch: Notifies the observers of the run, or None without observers.
    """

    def __init__(
        self, source: ClientSource, channel: Channel[RunEvent], model: str | None, watch: RunWatch | None
    ) -> None:
        self._source = source
        self._channel = channel
        self._model = model
        self._watch = watch

    @property
    def is_wanted(self) -> bool:
        """Whether the run has a listener or observers now, which get the progress."""
        return self._watch is not None or self._channel.has_listener

    @property
    def may_be_wanted(self) -> bool:
        """Whether the run has a listener or observers, or may get a listener while it goes on."""
        return self._watch is not None or not self._channel.is_muted

    def params(self) -> dict[str, Any]:
        """Returns the parameters of a request that make the server report its progress."""
        if self.is_wanted and self._source.server_kinds.get(self._model) == "llama.cpp":
            return {"return_progress": True}
        return {}

    async def report(self, chunk: Mapping[str, Any]) -> None:
        """Sends an event with the progress of the prompt, if a chunk reports it."""
        if "prompt_progress" in chunk and self.is_wanted and isinstance(progress := progress_of(chunk), PromptProgress):
            if self._watch is not None:
                self._watch.prompt_progressed(
                    processed=progress.processed, total=progress.total, cached=progress.cached
                )
            await self._channel.put(progress)

    def watch_loading(self, client: Any) -> asyncio.Task[None] | None:
        """Starts a task that reports how the model is being loaded, if the model is known not to be loaded yet.

        Args:
            client: The client that is about to send a request to the model.

        Returns:
            The task, which the caller has to cancel; None if there is nothing to report.
        """
        if not self.is_wanted or self._model not in self._source.unloaded_models:
            return None
        self._source.unloaded_models.discard(self._model)
        return asyncio.create_task(self._report_loading(client))

    async def _report_loading(self, client: Any) -> None:
        await self._send_loading(ModelLoading(self._model, None))
        if self._source.server_kinds.get(self._model) != "llama.cpp" or not hasattr(type(client), "models"):
            return
        last: float | None = None
        try:
            async for loading in client.models.loading(self._model):
                # The router of llama.cpp reports the same fraction several times.
                if loading.fraction not in (None, last):
                    last = loading.fraction
                    await self._send_loading(loading)
        except LLMError as error:
            # The model is still being loaded. If that fails, the request that needs the model reports the error.
            logger.debug("the progress of loading %r is unknown: %s", self._model, error)

    async def _send_loading(self, loading: ModelLoading) -> None:
        if self._watch is not None:
            self._watch.model_load_progressed(loading.model, loading.fraction)
        await self._channel.put(loading)
