"""A model works with tools: an async function, a plain one, and a tool whose schema is written by hand.

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


async def position(city: Annotated[str, "Its name, like Ulm."]) -> tuple[float, float]:
    """Looks up the latitude and the longitude of a city, in degrees."""
    if city.lower() not in PLACES:  # the model reads this, and may try another
        raise ToolError(f"there is no {city!r} here", hint=f"cities: {', '.join(PLACES)}")
    return PLACES[city.lower()]


def distance(latitudes: list[float], longitudes: list[float]) -> str:
    """Computes the distance between two points on the Earth.

    Args:
        latitudes: Of both points, in degrees.
        longitudes: Of both points, in degrees.
    """
    (north, south), (east, west) = map(math.radians, latitudes), map(math.radians, longitudes)
    cosine = math.sin(north) * math.sin(south) + math.cos(north) * math.cos(south) * math.cos(east - west)
    return f"{6371 * math.acos(max(-1.0, min(1.0, cosine))):.0f} km"


def rounded(value: float, step: float = 1) -> float:
    """What the last tool does; its schema says what type hints cannot."""
    return round(value / step) * step


round_schema = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "step": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["value"],
}
TOOLS: list[Tool | Callable[..., Any]] = [
    position,
    distance,
    Tool("round", "Rounds a number to multiples of a step.", round_schema, rounded),
]


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """A client of the server at `api_base`, or else of one that is started here."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def work(client: LLMClient, task: str) -> None:
    """Prints the task, each call with what the model was told, and the answer."""
    print(f"> {task}\n")
    agent = Agent(client, tools=TOOLS, system_prompt="Use the tools.", max_rounds=8, max_tokens=300)
    try:
        result = await agent.run(task)
    except MaxRoundsExceededError as error:  # a small model may not come to an answer
        result = error.result
    for done in result.log:
        for call in done.tool_calls:
            print(f"{call.call.name}({call.call.arguments}) -> {call.text}")
    print(f"\n{result.text}\n\n{result.stop_reason}: {result.rounds} rounds, {len(result.tool_calls)} calls")


async def main() -> None:
    """Reads the arguments, and shows it."""
    parser = argparse.ArgumentParser(description="Lets a model work with tools.")
    parser.add_argument("task", nargs="?", default=TASK)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await work(client, args.task)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"tools: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
