"""The servers that hold one model at a time, each in a process of its own.

The process prints its address and its models as a line of JSON, answers each line with the loads so far, and ends with
its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.processes import Process
from benchmarks.routers import EmbeddedRouter, LlamaServerRouter, two_models
from lmbridge.testing import OneModelServer

SEED: Final = 1796
TOKENS: Final = 40


class About(NamedTuple):
    """What there is to know of a server without starting it."""

    title: str
    is_real: bool
    tokens: int
    """How long an answer is."""
    gap: float
    """Seconds between two callers that start one after another."""


SERVERS: Final = {
    "killing": About("kills what it is generating (scripted)", is_real=False, tokens=TOKENS, gap=0.01),
    "llama-server": About("llama-server, router, `models-max 1`", is_real=True, tokens=16, gap=0.05),
    "embedded": About("small router over the embedded server", is_real=True, tokens=16, gap=0.05),
}


class SwapServer(Process):
    """A server of one of these kinds, fresh."""

    def __init__(self, kind: str) -> None:
        super().__init__(0, "-m", "benchmarks.swap_servers", kind)
        ready = json.loads(self.read(120) or '{"failed": true}')
        self.api_base: str = ready["api_base"]
        self.models: list[str] = ready["models"]

    def loads(self) -> list[str]:
        """The model of each load so far, in order."""
        self.write("loads")
        loads: list[str] = json.loads(self.read(30))
        return loads

    def __exit__(self, *raised: object) -> None:
        self.write("end")  # it has children of its own
        self.read(30)
        super().__exit__(None, None, None)


def swaps(loads: Sequence[str]) -> int:
    """Loads of another model than the one before."""
    return sum(before != after for before, after in pairwise(loads))


@asynccontextmanager
async def serving(kind: str) -> AsyncIterator[Any]:
    """The server itself, in the running loop."""
    if kind == "killing":
        async with OneModelServer(tokens=TOKENS, seed=SEED) as server:
            yield server
    else:
        with tempfile.TemporaryDirectory() as folder:
            models = await two_models(Path(folder))
            async with (LlamaServerRouter if kind == "llama-server" else EmbeddedRouter)(models) as router:
                yield router


async def serve(kind: str) -> None:
    loop = asyncio.get_running_loop()
    asked: asyncio.Queue[str] = asyncio.Queue()
    loop.add_reader(sys.stdin, lambda: asked.put_nowait(sys.stdin.readline()))
    async with serving(kind) as server:
        print(json.dumps({"api_base": server.api_base, "models": list(server.models)}), flush=True)
        while (await asked.get()).strip() == "loads":
            print(json.dumps(server.loads), flush=True)
        loop.remove_reader(sys.stdin)
    print(flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
