"""Counts the schemas for which a real model ends in valid JSON."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from typing import Any

import jsonschema.validators

from benchmarks.schema_peers import make_asker
from benchmarks.solving.real_models import start_model
from benchmarks.solving.real_schemas import sample_schemas
from benchmarks.workers import serve
from benchmarks.workers.solving_real import be_modest

_CONTEXT_LENGTH = 4096
_SECONDS_PER_SCHEMA = 300.0


class SchemaWorkloads:
    """The workloads of all peers with one model.

    Args:
        model: The name of the model in `benchmarks.solving.real_models`.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    async def ask(self, peer: str, schemas: int) -> dict[str, Any]:
        """Returns for how many schemas there was valid JSON, and how the others ended."""
        endings: Counter[str] = Counter()
        async with start_model(self._model, _CONTEXT_LENGTH) as api_base:
            asker = make_asker(peer, api_base)
            for url, schema in sample_schemas(schemas):
                about = schema.get("title") or schema.get("description") or url.rpartition("/")[2]
                prompt = f"Write a short example of a JSON document: {about}"
                try:
                    async with asyncio.timeout(_SECONDS_PER_SCHEMA):
                        value = await asker.ask(prompt, schema)
                    validator = jsonschema.validators.validator_for(schema)(schema)
                    endings["valid" if validator.is_valid(value) else "invalid"] += 1
                except Exception as error:  # noqa: BLE001 - a peer may raise any exception
                    endings[type(error).__name__] += 1
        return {"tasks": schemas, "solved": endings["valid"], "endings": dict(endings)}


if __name__ == "__main__":
    be_modest()
    logging.getLogger("lmbridge").setLevel(logging.ERROR)
    serve(SchemaWorkloads(sys.argv[1]))
