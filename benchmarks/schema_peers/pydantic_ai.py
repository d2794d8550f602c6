"""pydantic-ai with the schema as a `StructuredDict`, and the server's own structured output."""

from __future__ import annotations

from typing import Any

import openai
from pydantic_ai import Agent, NativeOutput, StructuredDict
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from benchmarks.schema_peers import base


class Asker(base.Asker):
    def __init__(self, base: str) -> None:
        client = openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0)
        self._provider = OpenAIProvider(openai_client=client)

    async def ask(self, prompt: str, schema: dict[str, Any]) -> Any:
        model = OpenAIChatModel(base.MODEL, provider=self._provider)
        output = NativeOutput(StructuredDict(schema, name="document"))
        settings: Any = {"temperature": 0, "max_tokens": base.MAX_TOKENS}
        return (await Agent(model, output_type=output, model_settings=settings).run(prompt)).output
