"""The agents whose solved tasks are counted, each used as its documentation shows.

A module in this folder is imported only by the worker that measures its agent. The frameworks need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from benchmarks.solving_peers.base import Solver
from benchmarks.specification import PeerInfo

SOLVERS: Final[Mapping[str, PeerInfo]] = {
    "lmbridge": PeerInfo("lmbridge", "lmbridge", "lmbridge", ("lmbridge",)),
    "openai-agents": PeerInfo("openai-agents", "openai_agents", "agents", ("openai-agents",)),
    "pydantic-ai": PeerInfo("pydantic-ai", "pydantic_ai", "pydantic_ai", ("pydantic-ai-slim",)),
    "langchain": PeerInfo("langchain", "langchain", "langchain", ("langchain", "langchain-openai")),
    "forge": PeerInfo("forge", "forge", "forge", ("forge-guardrails",), python=(3, 12)),
    "by-hand": PeerInfo("by hand, careful", "by_hand", "openai", ("openai",)),
}

LONG_TASK_SOLVERS: Final[Mapping[str, PeerInfo]] = {
    "lmbridge": SOLVERS["lmbridge"],
    "lmbridge-shorten": PeerInfo('lmbridge, "shorten"', "lmbridge_shorten", "lmbridge"),
    "lmbridge-drop": PeerInfo('lmbridge, "drop"', "lmbridge_drop", "lmbridge"),
    **{name: info for name, info in SOLVERS.items() if name != "lmbridge"},
}
"""The same agents, and lmbridge with the other values of its option `compaction`."""

REAL_TASK_SOLVERS: Final[Mapping[str, PeerInfo]] = {
    "lmbridge": SOLVERS["lmbridge"],
    "lmbridge-answer": PeerInfo('lmbridge, `on_limit="answer"`', "lmbridge_answer", "lmbridge"),
    **{name: info for name, info in SOLVERS.items() if name != "lmbridge"},
}
"""The same agents, and lmbridge with the option that is recommended for small models."""


def make_solver(name: str, base: str) -> Solver:
    """Makes an agent that uses the API at `base`."""
    module = {**LONG_TASK_SOLVERS, **REAL_TASK_SOLVERS}[name].module
    solver: Solver = importlib.import_module(f"benchmarks.solving_peers.{module}").Solver(base)
    return solver
