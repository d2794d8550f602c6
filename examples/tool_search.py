"""An agent has more tools than fit into its limit for definitions, and the model finds the one that it needs.

    python examples/tool_search.py
    python examples/tool_search.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "How many feet are 100 metres?"

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`. The
small model of that server can hardly search; a model of a few billion parameters can.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import permutations

from lmbridge import Agent, LLMClient, LLMError, LocalServer, MaxRoundsExceededError, Tool

TASK = "How many kilometres are 26.2 miles?"
METRES = {"miles": 1609.344, "yards": 0.9144, "feet": 0.3048, "inches": 0.0254, "kilometres": 1000.0, "metres": 1.0}
AMOUNT = {"type": "object", "properties": {"amount": {"type": "number"}}, "required": ["amount"]}


def converter(source: str, target: str) -> Tool:
    """Makes the tool that converts one unit of length to another."""

    def convert(amount: float) -> float:
        return round(amount * METRES[source] / METRES[target], 3)

    return Tool(f"{source}_to_{target}", f"Converts a length from {source} to {target}.", AMOUNT, convert)


TOOLS = [converter(source, target) for source, target in permutations(METRES, 2)]


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Connects to the server at `api_base`, or starts the embedded server if there is none."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def run_agent(client: LLMClient, task: str) -> None:
    """Runs an agent, and prints the task, each call with its result, and the answer."""
    print(f"> {task}\n")
    # All definitions would take about 1,500 tokens. Without this limit, they may take half of the model's context.
    agent = Agent(client, tools=TOOLS, max_definition_tokens=600, max_rounds=8, max_tokens=300)
    try:
        result = await agent.run(task)
    except MaxRoundsExceededError as error:
        # A small model may keep calling tools until its rounds are used up.
        result = error.result
    for round_record in result.log:
        for call in round_record.tool_calls:
            print(f"{call.call.name}({call.call.arguments}) -> {call.text}")
    print(f"\n{result.text}\n\n{result.stop_reason}: {result.rounds} rounds, {len(TOOLS)} tools")


async def main() -> None:
    """Reads the arguments of the command, and runs the example."""
    parser = argparse.ArgumentParser(description="Lets a model search for the tool that it needs.")
    parser.add_argument("task", nargs="?", default=TASK)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the base URL of your server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="the model to use on that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await run_agent(client, args.task)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"tool_search: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
