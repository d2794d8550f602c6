"""The agent loops that are compared, each used as its documentation shows.

A module in this folder is imported only by the worker that measures its loop. The frameworks need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from benchmarks.agent_peers.base import AgentPeer
from benchmarks.specification import PeerInfo

AGENT_PEERS: Final[Mapping[str, PeerInfo]] = {
    "limit": PeerInfo("limit, by hand", "limit", "aiohttp", ("aiohttp", "orjson")),
    "limit-again": PeerInfo("limit again", "limit", "aiohttp", ("aiohttp", "orjson")),
    "plain": PeerInfo("by hand, not streamed", "plain", "aiohttp", ("aiohttp", "orjson")),
    "lmbridge": PeerInfo("lmbridge", "lmbridge", "lmbridge", ("lmbridge", "msgspec")),
    "openai-agents": PeerInfo("openai-agents", "openai_agents", "agents", ("openai-agents", "openai"), few_rounds=True),
    "pydantic-ai": PeerInfo(
        "pydantic-ai", "pydantic_ai", "pydantic_ai", ("pydantic-ai-slim", "pydantic"), few_rounds=True
    ),
}


def make_agent(name: str, base: str) -> AgentPeer:
    """Makes an agent that uses the API at `base`."""
    agent: AgentPeer = importlib.import_module(f"benchmarks.agent_peers.{AGENT_PEERS[name].module}").Agent(base)
    return agent
