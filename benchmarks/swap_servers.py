"""The servers that hold one model at a time, each in a separate process.

The process prints its address and its models as a line of JSON, answers each line "loads" with the models that it has
loaded so far, and ends at any other line, or when its stdin ends.
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

from benchmarks.processes import SERVER_CORE, MeasurementError, PinnedProcess
from benchmarks.routers import EmbeddedRouter, LlamaServerRouter, two_models
from lmbridge.testing import OneModelServer

_SEED: Final = 1796
_TOKENS: Final = 40
_START_SECONDS: Final = 120.0
_ANSWER_SECONDS: Final = 30.0


class SwapServerInfo(NamedTuple):
    """Facts about a server that are known without starting it."""

    title: str
    """The name of the server in the table."""
    is_real: bool
    """True if it runs models, False if it is scripted."""
    tokens: int
    """The number of tokens of each answer."""
    seconds_between_callers: float
    """The pause between two requests, in the scenario with callers that come one after another."""


SWAP_SERVERS: Final = {
    "killing": SwapServerInfo("kills what it is generating (scripted)", False, _TOKENS, 0.01),
    "llama-server": SwapServerInfo("llama-server, router, `models-max 1`", True, 16, 0.05),
    "embedded": SwapServerInfo("small router over the embedded server", True, 16, 0.05),
}


class SwapServer(PinnedProcess):
    """A new server in a separate process.

    Args:
        kind: Its name in `SWAP_SERVERS`.

    Raises:
        MeasurementError: The server did not start.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(SERVER_CORE, "-m", "benchmarks.swap_servers", kind)
        line = self.read(_START_SECONDS)
        if not line:
            raise MeasurementError(f"the server {kind!r} did not start")
        ready = json.loads(line)
        self.api_base: str = ready["api_base"]
        self.models: list[str] = ready["models"]

    def loads(self) -> list[str]:
        """Returns the model of each load so far, in order."""
        self.write("loads")
        loads: list[str] = json.loads(self.read(_ANSWER_SECONDS))
        return loads

    def close(self) -> None:
        """Lets the server end its own processes before it is killed."""
        self.write("end")
        self.read(_ANSWER_SECONDS)
        super().close()


def count_swaps(loads: Sequence[str]) -> int:
    """Returns how often a server loaded another model than the one that it had loaded before."""
    return sum(before != after for before, after in pairwise(loads))


def scripted_texts(models: Sequence[str]) -> dict[str, str]:
    """Returns the answers of the scripted server's models."""
    server = OneModelServer(models, tokens=_TOKENS)
    return {model: server.text(model) for model in models}


@asynccontextmanager
async def _running_server(kind: str) -> AsyncIterator[Any]:
    """Runs a server in this event loop."""
    if kind == "killing":
        async with OneModelServer(tokens=_TOKENS, seed=_SEED) as server:
            yield server
    else:
        with tempfile.TemporaryDirectory() as folder:
            models = await two_models(Path(folder))
            async with (LlamaServerRouter if kind == "llama-server" else EmbeddedRouter)(models) as router:
                yield router


async def _serve(kind: str) -> None:
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[str] = asyncio.Queue()
    loop.add_reader(sys.stdin, lambda: commands.put_nowait(sys.stdin.readline()))
    async with _running_server(kind) as server:
        print(json.dumps({"api_base": server.api_base, "models": list(server.models)}), flush=True)
        while (await commands.get()).strip() == "loads":
            print(json.dumps(server.loads), flush=True)
        loop.remove_reader(sys.stdin)
    print(flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
