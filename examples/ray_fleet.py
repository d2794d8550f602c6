"""Runs an agent on many questions in the processes of a Ray cluster, behind one gateway.

    pip install 'lmbridge[ray]'
    python examples/ray_fleet.py
    python examples/ray_fleet.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b --questions 1000

It starts a local Ray, or connects to the cluster that RAY_ADDRESS names. The gateway runs in this process and schedules
the requests of all others; on several machines, give it an address that they can reach. Without `--api-base` and
without LMBRIDGE_API_BASE in the environment, it starts the embedded server, which needs the extra `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

from lmbridge import Agent, LLMClient, LLMError, LocalServer
from lmbridge.fleet import ProgressBar, map_runs
from lmbridge.gateway import Gateway


def agent_factory(api_base: str, model: str | None) -> Callable[[], AbstractAsyncContextManager[Agent]]:
    """Returns the function that makes the agent of each process. Ray sends it there, so it holds no connection."""

    @asynccontextmanager
    async def make_agent() -> AsyncIterator[Agent]:
        async with LLMClient(api_base, model, priority="batch") as client:
            yield Agent(client, max_tokens=30)

    return make_agent


async def ask_all(api_base: str, model: str | None, questions: int) -> int:
    """Asks the questions through a gateway in front of the server, and returns how many failed."""
    tasks = [f"What is {number} plus {number}?" for number in range(questions)]
    failed = 0
    async with Gateway(upstreams=[api_base]) as gateway:
        factory = agent_factory(gateway.api_base, model)
        fleet = map_runs(tasks, factory, backend="ray", max_in_flight=16, on_progress=ProgressBar("questions"))
        async with aclosing(fleet):
            async for outcome in fleet:
                failed += outcome.result is None
                text = outcome.error if outcome.result is None else " ".join(outcome.result.text.split())
                print(f"{outcome.task} {text}", flush=True)
    return failed


async def main() -> int:
    """Reads the arguments and asks the questions."""
    parser = argparse.ArgumentParser(description="Runs an agent on many questions in a Ray cluster.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", help="a model of that server")
    parser.add_argument("--questions", type=int, default=20, help="how many questions to ask")
    args = parser.parse_args()
    if args.api_base:
        return 1 if await ask_all(args.api_base, args.model, args.questions) else 0
    async with LocalServer(n_parallel=4) as server:
        return 1 if await ask_all(server.api_base, server.model, args.questions) else 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except (LLMError, ImportError) as error:
        sys.exit(f"ray_fleet: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
