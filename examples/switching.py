"""What happens to runs when another model is asked for: the four switch policies, one after the other.

    python examples/switching.py
    python examples/switching.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b --other gemma-3-4b

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`,
which answers to any name with the one model that it has.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias, get_args

from lmbridge import (
    Agent,
    LLMClient,
    LLMError,
    LocalServer,
    ModelChangedDuringExecutionError,
    RunHandle,
    TextDelta,
)

Policy: TypeAlias = Literal["isolate", "reject", "cancel", "drain"]


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """A client of the server at `api_base`, or else of one that is started here."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with (
            LocalServer() as server,
            LLMClient(server.api_base, server.model, model_mismatch="ignore") as client,
        ):
            yield client


async def outcome(handle: RunHandle) -> str:
    """How a run ended, in words."""
    try:
        result = await handle.result()
    except ModelChangedDuringExecutionError as error:
        return f"not to its end: {error.old_model} -> {error.new_model}"
    return f"to its end ({result.stop_reason})"


async def compare(client: LLMClient, policy: Policy, other: str) -> None:
    """A run with the client's model, and in the middle of it one with another."""
    agent = Agent(client, switch_policy=policy, max_tokens=60)
    first = agent.start("Tell a story about a lighthouse.")
    async for event in first.events():
        if isinstance(event, TextDelta):
            break
    second = agent.start("Say hello.", model=other)  # "reject" tells it when its result is asked for
    print(f"== {policy}\nfirst run: {await outcome(first)}\nsecond run: {await outcome(second)}", flush=True)


async def switch(client: LLMClient, other: str) -> None:
    """The agent's own model, for all runs that name none; the client keeps its own."""
    agent = Agent(client, switch_policy="drain", max_tokens=60)
    first = agent.start("Tell a story about a lighthouse.")
    await agent.switch_model(other)  # waits for the first
    print(f"== switch_model\nfirst run: {await outcome(first)}\nthe agent's model: {agent.model}")


async def main() -> None:
    """Reads the arguments, and shows it."""
    parser = argparse.ArgumentParser(description="Shows the switch policies.")
    parser.add_argument("--other", help="another model of that server")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        other = args.other or f"{client.model or 'model'}-other"
        for policy in get_args(Policy):
            await compare(client, policy, other)
        await switch(client, other)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"switching: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
