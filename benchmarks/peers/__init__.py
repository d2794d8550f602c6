"""The clients that are compared, each in the way that its own documentation shows.

A module here is imported only in the process of its client.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from benchmarks.peers.base import Peer


class About(NamedTuple):
    """What there is to know of a client without importing it."""

    title: str
    module: str
    imports: str
    """What `import` costs, to be measured."""
    distributions: tuple[str, ...]
    """What it consists of."""
    far: bool = False
    """Whether it is so far from the limit that a few rounds are enough."""


# Outside of `make bench` there may be no orjson; msgspec is as fast.
_LIMIT: Final = "aiohttp, orjson" if importlib.util.find_spec("orjson") else "aiohttp, msgspec"
PEERS: Final[Mapping[str, About]] = {
    "limit": About("limit", "limit", _LIMIT, ("aiohttp", "orjson")),
    "control": About("limit again", "limit", _LIMIT, ("aiohttp", "orjson")),
    "lmbridge": About("lmbridge", "lmbridge", "lmbridge", ("lmbridge", "aiohttp", "msgspec")),
    "openai": About("openai-python", "openai", "openai", ("openai", "httpx2", "pydantic"), far=True),
    "httpx": About("httpx by hand", "httpx", "httpx", ("httpx", "h11", "orjson"), far=True),
    "litellm": About("litellm", "litellm", "litellm", ("litellm", "openai", "httpx"), far=True),
}


def client(name: str, base: str, at_once: int) -> Peer:
    """A client that sends up to `at_once` requests at a time to the API at `base`."""
    made: Peer = importlib.import_module(f"benchmarks.peers.{PEERS[name].module}").Client(base, at_once)
    return made


def environment() -> dict[str, str]:
    """The environment of all processes: no proxies, no keys, nothing fetched or reported, and a heap that stays.

    asyncio reads into a new buffer of 256 KiB each time. Whether that is given back to the system each time, two page
    faults and 20 microseconds a request, is an accident of what else lies in the heap; so nothing is given back.
    """
    unwanted = ("PYTHONDONTWRITEBYTECODE", "PYTHONOPTIMIZE", "PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONTRACEMALLOC")
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env = {name: value for name, value in env.items() if name not in unwanted}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "CRITICAL", "DO_NOT_TRACK": "1"}
    ours = {"LMBRIDGE_API_BASE": "", "LM_API_TOKEN": "", "DEFAULT_MODEL": ""}
    heap = {"MALLOC_TRIM_THRESHOLD_": str(2**28), "MALLOC_TOP_PAD_": str(2**26)}
    return {**env, **quiet, **ours, **heap}


def versions(names: Iterable[str], among: Mapping[str, About] = PEERS) -> dict[str, str]:
    """The versions of all that these clients consist of, as far as they are installed."""
    found: dict[str, str] = {}
    for distribution in (each for name in names for each in among[name].distributions):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
