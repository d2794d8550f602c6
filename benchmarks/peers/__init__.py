"""The clients that are compared, each used as its documentation shows.

A module in this folder is imported only by the worker that measures its client.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Final

from benchmarks.peers.base import ClientPeer
from benchmarks.specification import PeerInfo

# Only `make bench` installs orjson. Without it, the limit decodes with msgspec, which is as fast.
_LIMIT_IMPORTS: Final = "aiohttp, orjson" if importlib.util.find_spec("orjson") else "aiohttp, msgspec"
_LIMIT_DISTRIBUTIONS: Final = ("aiohttp", "orjson")
PEERS: Final[Mapping[str, PeerInfo]] = {
    "limit": PeerInfo("limit", "limit", _LIMIT_IMPORTS, _LIMIT_DISTRIBUTIONS),
    "limit-again": PeerInfo("limit again", "limit", _LIMIT_IMPORTS, _LIMIT_DISTRIBUTIONS),
    "lmbridge": PeerInfo("lmbridge", "lmbridge", "lmbridge", ("lmbridge", "aiohttp", "msgspec")),
    "openai": PeerInfo("openai-python", "openai", "openai", ("openai", "httpx2", "pydantic"), few_rounds=True),
    "httpx2": PeerInfo("httpx2 by hand", "httpx2", "httpx2", ("httpx2", "h11", "orjson"), few_rounds=True),
    "litellm": PeerInfo("litellm", "litellm", "litellm", ("litellm", "openai", "httpx"), few_rounds=True),
}


def make_client(name: str, base: str, at_once: int) -> ClientPeer:
    """Makes a client that sends up to `at_once` requests at a time to the API at `base`."""
    client: ClientPeer = importlib.import_module(f"benchmarks.peers.{PEERS[name].module}").Client(base, at_once)
    return client
