"""A model answers a question with three tools: an async function, a plain function, and a tool with its own schema.

    python examples/tools.py
    python examples/tools.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "How far is it from Ulm to Oslo?"

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from lmbridge import Agent, LLMClient, LLMError, LocalServer, MaxRoundsExceededError, Tool, ToolError

TASK = "How far is it from Ulm to Oslo, in kilometres?"
PLACES = {"oslo": (59.91, 10.75), "ulm": (48.40, 9.99), "vienna": (48.21, 16.37)}


async def position(city: Annotated[str, "The name of the city, such as Ulm."]) -> tuple[float, float]:
    """Looks up the latitude and the longitude of a city, in degrees."""
    if city.lower() not in PLACES:
        # The model reads the text of a ToolError, and may try another city.
        raise ToolError(f"the city {city!r} is unknown", hint=f"known cities: {', '.join(PLACES)}")
    return PLACES[city.lower()]


def distance(latitudes: list[float], longitudes: list[float]) -> str:
    """Computes the distance between two points on the Earth.

    Args:
        latitudes: The latitudes of both points, in degrees.
        longitudes: The longitudes of both points, in degrees.
    """
    (north, south), (east, west) = map(math.radians, latitudes), map(math.radians, longitudes)
    cosine = math.sin(north) * math.sin(south) + math.cos(north) * math.cos(south) * math.cos(east - west)
    return f"{6371 * math.acos(max(-1.0, min(1.0, cosine))):.0f} km"


def round_to_step(value: float, step: float = 1) -> float:
    """Rounds a number to a multiple of a step."""
    return round(value / step) * step


# Type hints cannot say that a number must be greater than 0, so this tool has its own schema.
ROUND_SCHEMA = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "step": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["value"],
}
TOOLS: list[Tool | Callable[..., Any]] = [
    position,
    distance,
    Tool("round", "Rounds a number to multiples of a step.", ROUND_SCHEMA, round_to_step),
]


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
    agent = Agent(client, tools=TOOLS, system_prompt="Use the tools.", max_rounds=8, max_tokens=300)
    try:
        result = await agent.run(task)
    except MaxRoundsExceededError as error:
        # A small model may keep calling tools until its rounds are used up.
        result = error.result
    for round_record in result.log:
        for call in round_record.tool_calls:
            print(f"{call.call.name}({call.call.arguments}) -> {call.text}")
    print(f"\n{result.text}\n\n{result.stop_reason}: {result.rounds} rounds, {len(result.tool_calls)} calls")


async def main() -> None:
    """Reads the arguments of the command, and runs the example."""
    parser = argparse.ArgumentParser(description="Lets a model work with tools.")
    parser.add_argument("task", nargs="?", default=TASK)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the base URL of your server")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="the model to use on that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await run_agent(client, args.task)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"tools: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
