"""The compared ways to ask for JSON that follows a schema, each used as its documentation shows.

A module in this folder is imported only by the worker that measures it. The frameworks need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from benchmarks.schema_peers.base import Asker
from benchmarks.specification import PeerInfo

ASKERS: Final[Mapping[str, PeerInfo]] = {
    "lmbridge": PeerInfo("lmbridge, `parse`", "lmbridge", "lmbridge", ("lmbridge",)),
    "openai": PeerInfo("openai-python, schema as it is", "openai_client", "openai", ("openai",)),
    "pydantic-ai": PeerInfo("pydantic-ai, `NativeOutput`", "pydantic_ai", "pydantic_ai", ("pydantic-ai-slim",)),
}


def make_asker(name: str, base: str) -> Asker:
    """Makes an asker that uses the API at `base`."""
    asker: Asker = importlib.import_module(f"benchmarks.schema_peers.{ASKERS[name].module}").Asker(base)
    return asker
