"""A model answers a question with two tools, one of which is async.

    python examples/tools.py "How far is it from Ulm to Oslo, in kilometres?"

It uses the server of LMBRIDGE_API_BASE, or LM Studio.
"""

from __future__ import annotations

import asyncio
import math
import sys
from typing import Annotated

from lmbridge import Agent, LLMClient, LLMError, ToolError

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


async def main(task: str = "How far is it from Ulm to Oslo, in kilometres?") -> None:
    """Runs an agent, and prints each call with its result, and the answer."""
    async with LLMClient() as client:
        # A small model may keep calling tools; then it is asked for the best answer that it can give.
        agent = Agent(client, tools=[position, distance], max_rounds=8, max_tokens=300, on_limit="answer")
        result = await agent.run(task)
    for done in result.log:
        for call in done.tool_calls:
            print(f"{call.call.name}({call.call.arguments}) -> {call.text}")
    print(f"\n{result.text}\n\n{result.stop_reason}: {result.rounds} rounds, {len(result.tool_calls)} calls")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:2]))
    except LLMError as error:
        sys.exit(f"tools: {error}")
