"""openai-python with the unchanged schema in `response_format`."""

from __future__ import annotations

import json
from typing import Any

import openai

from benchmarks.schema_peers import base


class Asker(base.Asker):
    def __init__(self, base: str) -> None:
        self._client = openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0)

    async def ask(self, prompt: str, schema: dict[str, Any]) -> Any:
        completion = await self._client.chat.completions.create(
            model=base.MODEL,
            messages=[{"role": "user", "content": prompt}],
            response_format={"type": "json_schema", "json_schema": {"name": "document", "schema": schema}},
            max_tokens=base.MAX_TOKENS,
            temperature=0,
        )
        return json.loads(completion.choices[0].message.content or "")
