"""The agent loops that are compared, each in the way that its own documentation shows.

A module here is imported only in the process of its loop. openai-agents and pydantic-ai need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from benchmarks.agent_peers.base import AgentPeer
from benchmarks.peers import About

AGENTS: Final[Mapping[str, About]] = {
    "limit": About("limit, by hand", "limit", "aiohttp", ("aiohttp", "orjson")),
    "control": About("limit again", "limit", "aiohttp", ("aiohttp", "orjson")),
    "plain": About("by hand, not streamed", "plain", "aiohttp", ("aiohttp", "orjson")),
    "lmbridge": About("lmbridge", "lmbridge", "lmbridge", ("lmbridge", "msgspec")),
    "openai-agents": About("openai-agents", "openai_agents", "agents", ("openai-agents", "openai"), far=True),
    "pydantic-ai": About("pydantic-ai", "pydantic_ai", "pydantic_ai", ("pydantic-ai-slim", "pydantic"), far=True),
}


def agent(name: str, base: str) -> AgentPeer:
    """A loop at work on the API at `base`."""
    made: AgentPeer = importlib.import_module(f"benchmarks.agent_peers.{AGENTS[name].module}").Agent(base)
    return made
