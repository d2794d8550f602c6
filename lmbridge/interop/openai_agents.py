"""`LMBridgeModel`: a model of openai-agents on top of an `LLMClient`.

The model for chat completions of openai-agents translates messages, tools and outputs. The client that it gets here
belongs to lmbridge; see `lmbridge.interop.openai`.
"""

from __future__ import annotations

try:
    from agents import OpenAIChatCompletionsModel
except ImportError as _error:
    raise ImportError(
        "lmbridge.interop.openai_agents needs openai-agents: pip install 'lmbridge[openai-agents]'"
    ) from _error

from lmbridge.client import LLMClient
from lmbridge.interop.openai import openai_client

__all__ = ["LMBridgeModel"]


class LMBridgeModel(OpenAIChatCompletionsModel):
    """A model of openai-agents that asks an `LLMClient`.

    ::

        async with LLMClient() as client:
            agent = agents.Agent(name="Weather", model=LMBridgeModel(client, "qwen3-4b"), tools=[...])
            result = await agents.Runner.run(agent, "What is the weather in Oslo?")

    Model scheduling, retries, timeouts and `model_mismatch` are those of the client. Errors are those of openai-python,
    as with the other models of openai-agents; `__cause__` is the `LLMError`. If openai-agents has a key of OpenAI, it
    sends traces there; `agents.set_tracing_disabled(True)` stops that.

    Args:
        client: The client. It has to be open as long as the model is used, and the program closes it.
        model: The name of the model. Default: the client's model; if it has none, the server chooses.
    """

    def __init__(self, client: LLMClient, model: str | None = None) -> None:
        super().__init__(model or client.model or "", openai_client(client))
