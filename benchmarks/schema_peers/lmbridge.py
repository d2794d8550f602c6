"""lmbridge's `parse` with a pydantic model whose JSON schema is the given one."""

from __future__ import annotations

from typing import Any

import jsonschema.validators
from pydantic import BaseModel, ConfigDict, model_validator

import lmbridge
from benchmarks.schema_peers import base


class Asker(base.Asker):
    def __init__(self, base: str) -> None:
        self._client = lmbridge.LLMClient(base)

    async def ask(self, prompt: str, schema: dict[str, Any]) -> Any:
        messages = [{"role": "user", "content": prompt}]
        answer = await self._client.parse(
            messages, _type_of(schema), model=base.MODEL, max_tokens=base.MAX_TOKENS, temperature=0
        )
        return answer.value


def _type_of(schema: dict[str, Any]) -> type[Any]:
    """Returns a type whose instances have a JSON value that is valid against a schema."""
    validator = jsonschema.validators.validator_for(schema)(schema)

    class Document(BaseModel):
        model_config = ConfigDict(extra="allow")

        @classmethod
        def model_json_schema(cls, *_: Any, **__: Any) -> dict[str, Any]:
            return schema

        @model_validator(mode="before")
        @classmethod
        def check(cls, value: Any) -> Any:
            if (error := next(validator.iter_errors(value), None)) is not None:
                raise ValueError(f"{error.json_path}: {error.message[:300]}")
            return {"value": value}

    return Document
