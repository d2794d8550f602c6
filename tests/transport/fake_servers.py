"""Servers without sockets, for tests of several servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from lmbridge import Limits, LLMClient, NodePool
from lmbridge.testing import MockRequest, MockResponse, MockTransport

Answer = Callable[[MockRequest], Any]


class FakeServer:
    """A server that answers like LM Studio: it has models, some of which are loaded.

    Args:
        name: The name of the host, which is the text of the answers as well.
        models: The models that it has.
        loaded: Those that are loaded. By default all are.
        slots: The `max_concurrency` of its transport.
        max_loaded_models: That of the limits of its transport.
    """

    def __init__(
        self,
        name: str,
        models: Iterable[str] = ("m",),
        *,
        loaded: Iterable[str] | None = None,
        slots: int = 2,
        max_loaded_models: int | None = None,
    ) -> None:
        self.name = name
        self.models = list(models)
        self.loaded = set(self.models if loaded is None else loaded)
        self.down: Exception | None = None
        """What every request raises, if it is set."""
        self.failure: Any = None
        """What every generation gets in place of an answer: a response, or an exception that is raised."""
        self.gate: asyncio.Event | None = None
        """Set it to hold the answers back."""
        self.generations: list[Any] = []
        """The bodies of the generations."""
        self.questions: list[str] = []
        """The paths of all other requests."""
        limits = Limits(max_concurrency=slots, max_loaded_models=max_loaded_models)
        self.transport = MockTransport(self._handle, api_base=f"http://{name}.test/v1", limits=limits)

    @property
    def api_base(self) -> str:
        return self.transport.api_base

    async def _handle(self, request: MockRequest) -> Any:
        if request.method == "POST":
            self.generations.append(request.json)
        else:
            self.questions.append(request.path)
        if self.down is not None:
            raise self.down
        return await self._generate(request) if request.method == "POST" else self._describe(request)

    def _describe(self, request: MockRequest) -> Any:
        if request.path == "/v1/models":
            return {"data": [{"id": model, "owned_by": "organization_owner"} for model in self.models]}
        if request.path == "/api/v1/models":
            return {
                "models": [
                    {"key": model, "loaded_instances": [{"id": model}] if model in self.loaded else []}
                    for model in self.models
                ]
            }
        return MockResponse(404)

    async def _generate(self, request: MockRequest) -> Any:
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            return self.failure
        model = request.json.get("model")
        if model is not None and model not in self.models:
            return MockResponse(404, json={"error": {"message": f"model '{model}' not found"}})
        if model is not None:
            self.loaded.add(model)
        if request.path == "/v1/responses":
            output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": self.name}]}]
            number = len(self.generations)
            return {"id": f"{self.name}-{number}", "object": "response", "status": "completed", "output": output}
        if request.path == "/v1/embeddings":
            return {"data": [{"index": 0, "embedding": [1.0]}], "model": model}
        if request.json.get("stream"):
            return [
                {"model": model, "choices": [{"index": 0, "delta": {"content": self.name}, "finish_reason": "stop"}]}
            ]
        message = {"role": "assistant", "content": self.name}
        return {"model": model, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def pool_of(*servers: FakeServer, **options: Any) -> NodePool:
    return NodePool([server.transport for server in servers], **options)


def client_of(*servers: FakeServer, model: str | None = "m", **options: Any) -> LLMClient:
    return LLMClient(transport=pool_of(*servers), model=model, **options)
