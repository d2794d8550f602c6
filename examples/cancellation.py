"""Stops a run in five ways, and shows what is left of it: by its handle, a time limit, a sibling, a budget, a break.

    python examples/cancellation.py
    python examples/cancellation.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lmbridge import Agent, LLMClient, LLMError, LocalServer, RunHandle, TaskCancelledError, TextDelta

LONG = "Write a long story about a lighthouse and the people who live near it."


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a local server that is started for the example."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def wait_for_first_text(handle: RunHandle) -> None:
    """Waits for the first text of a run. Leaving the events of a handle does not stop the run."""
    async for event in handle.events():
        if isinstance(event, TextDelta):
            return


async def by_handle(agent: Agent) -> None:
    """Cancels a run by its handle. Awaiting the result then raises an error that holds the run so far."""
    handle = agent.start(LONG)
    await wait_for_first_text(handle)
    handle.cancel()
    try:
        await handle.result()
    except TaskCancelledError as error:
        messages = error.partial.messages if error.partial else []
        print(f"-- stopped; {len(messages)} messages to continue from")
    else:
        print("-- it had already ended")


async def by_time(agent: Agent) -> None:
    """Puts a run under `asyncio.timeout`. When that raises, the server has already stopped generating."""
    handle = agent.start(LONG)
    try:
        async with asyncio.timeout(1):
            await handle.result()
    except TimeoutError:
        print(f"-- {handle.stop_reason} after {len(handle.partial.text)} characters")
    else:
        print("-- it ended in time")


async def by_budget(client: LLMClient) -> None:
    """Uses `max_seconds`, which is not an error: the result has the text so far, and says why the run ended."""
    result = await Agent(client, max_tokens=1000, max_seconds=1).run(LONG)
    print(f"-- {result.stop_reason} after {len(result.text)} characters")


async def by_a_sibling(agent: Agent) -> None:
    """Lets another task of the same group fail, which cancels the whole group, the run included."""
    handle = agent.start(LONG)

    async def fail() -> None:
        await wait_for_first_text(handle)
        raise RuntimeError("the power is out")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(handle.result())
            group.create_task(fail())
    except* RuntimeError as errors:
        print(f"-- {errors.exceptions[0]}; the run: {handle.stop_reason}")


async def by_leaving(agent: Agent) -> None:
    """Leaves an event stream early, which cancels its run and waits for the run's end."""
    async with agent.stream(LONG) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    print("-- left")


async def show(client: LLMClient) -> None:
    """Runs all of the examples above."""
    agent = Agent(client, max_tokens=1000)
    for way in (by_handle, by_time, by_a_sibling, by_leaving):
        print(f"== {way.__name__}")
        await way(agent)
    print("== by_budget")
    await by_budget(client)


async def main() -> None:
    """Parses the arguments and runs the example."""
    parser = argparse.ArgumentParser(description="Stops a run in five ways.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of a running server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="the name of a model on that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await show(client)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"cancellation: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
