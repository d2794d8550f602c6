"""Shows what happens to a run when another model is requested, for each of the four switch policies.

    python examples/switching.py
    python examples/switching.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b --other gemma-3-4b

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`,
which answers requests for any model with the only one that it has.
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
    """Yields a client of the server at `api_base`, or of a local server that is started for the example."""
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
    """Waits for a run, and describes how it ended."""
    try:
        result = await handle.result()
    except ModelChangedDuringExecutionError as error:
        return f"stopped by a change of model: {error.old_model} -> {error.new_model}"
    return f"completed ({result.stop_reason})"


async def compare(client: LLMClient, policy: Policy, other: str) -> None:
    """Starts a run with the client's model, and another one with a different model in the middle of it."""
    agent = Agent(client, switch_policy=policy, max_tokens=60)
    first = agent.start("Tell a story about a lighthouse.")
    async for event in first.events():
        if isinstance(event, TextDelta):
            break
    # Under "reject", the error is raised when the result is awaited.
    second = agent.start("Say hello.", model=other)
    print(f"== {policy}\nfirst run: {await outcome(first)}\nsecond run: {await outcome(second)}", flush=True)


async def switch(client: LLMClient, other: str) -> None:
    """Changes the model of all later runs that name none. The client keeps its own model."""
    agent = Agent(client, switch_policy="drain", max_tokens=60)
    first = agent.start("Tell a story about a lighthouse.")
    # Under "drain", this waits for the end of the first run.
    await agent.switch_model(other)
    print(f"== switch_model\nfirst run: {await outcome(first)}\nthe agent's model: {agent.model}")


async def main() -> None:
    """Parses the arguments and runs the example."""
    parser = argparse.ArgumentParser(description="Shows the four switch policies.")
    parser.add_argument("--other", help="the name of another model on that server")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of a running server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="the name of a model on that server")
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
