"""`LMBridgeModel`: a model of pydantic-ai on top of an `LLMClient`.

pydantic-ai's own model for chat completions translates messages, tools and outputs, and maps the errors of
openai-python to its own. The client that it gets here belongs to lmbridge; see `lmbridge.interop.openai`.
"""

from __future__ import annotations

from typing import Final

try:
    from openai import AsyncOpenAI
    from pydantic_ai import ModelProfile, ModelSettings
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.profiles.openai import OpenAIJsonSchemaTransformer, OpenAIModelProfile
    from pydantic_ai.providers import Provider
except ImportError as _error:
    raise ImportError("lmbridge.interop.pydantic_ai needs pydantic-ai: pip install 'lmbridge[pydantic-ai]'") from _error

from lmbridge.client import LLMClient
from lmbridge.interop.openai import openai_client

__all__ = ["LMBridgeModel"]

_LOCAL_SERVERS: Final = OpenAIModelProfile(
    json_schema_transformer=OpenAIJsonSchemaTransformer,
    supports_json_schema_output=True,
    supports_json_object_output=True,
    openai_chat_thinking_field="reasoning_content",
    openai_supports_strict_tool_definition=False,
    openai_chat_supports_max_completion_tokens=False,
)
"""The part of OpenAI's API that LM Studio, llama.cpp and vLLM support. Ollama has reasoning in a field `reasoning`."""


class _ClientProvider(Provider[AsyncOpenAI]):
    """A provider of pydantic-ai whose client sends its requests through an `LLMClient`."""

    def __init__(self, client: LLMClient) -> None:
        self._client: AsyncOpenAI = openai_client(client)

    @property
    def name(self) -> str:
        return "lmbridge"

    @property
    def base_url(self) -> str:
        return str(self._client.base_url)

    @property
    def client(self) -> AsyncOpenAI:
        return self._client

    @staticmethod
    def model_profile(model_name: str) -> ModelProfile | None:  # noqa: ARG004 - the name is pydantic-ai's
        return _LOCAL_SERVERS


class LMBridgeModel(OpenAIChatModel):
    """A model of pydantic-ai that asks an `LLMClient`.

    ::

        async with LLMClient() as client:
            agent = pydantic_ai.Agent(LMBridgeModel(client, "qwen3-4b"), tools=[...])
            print((await agent.run("What is the weather in Oslo?")).output)

    Model scheduling, retries, timeouts and `model_mismatch` are those of the client. Errors of lmbridge are raised as
    pydantic-ai's `ModelHTTPError` or `ModelAPIError`, so that `FallbackModel` works. The `LLMError` itself is further
    down the chain of `__cause__`.

    Args:
        client: The client. It has to be open as long as the model is used, and the program closes it.
        model: The name of the model. Default: the client's model; if it has none, the server chooses.
        profile: What the server and the model support. Default: what LM Studio, llama.cpp and vLLM support.
        settings: Settings of every request, such as `temperature`. Default: none.
    """

    def __init__(
        self,
        client: LLMClient,
        model: str | None = None,
        *,
        profile: ModelProfile | None = None,
        settings: ModelSettings | None = None,
    ) -> None:
        super().__init__(
            model or client.model or "", provider=_ClientProvider(client), profile=profile, settings=settings
        )
