"""Adds up what a program costs, with an observer. The log, on stderr, has a line for each request.

    python examples/observer.py

It uses the server of LMBRIDGE_API_BASE, or LM Studio.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

from lmbridge import Agent, LLMClient, LLMError, enable_logging
from lmbridge.observe import ObservedEvent, RequestAdmitted, RequestEnded, RequestQueued, ToolCallEnded


async def count_people(city: str) -> str:
    """Counts the people of a city."""
    return {"ulm": "130,000", "oslo": "720,000"}.get(city.lower(), "nobody has counted them")


class Meter:
    """Counts requests, tokens and calls. It is called in the middle of the work, so it only adds up."""

    def __init__(self) -> None:
        self.total, self.seconds_waited = Counter[str](), 0.0

    def on_event(self, event: ObservedEvent) -> None:
        """Handles an event."""
        match event:
            case RequestQueued():
                self.total[event.operation] += 1
            case RequestAdmitted():
                self.seconds_waited += event.waited
            case RequestEnded():
                self.total["prompt tokens"] += event.prompt_tokens or 0
                self.total["generated tokens"] += event.completion_tokens or 0
            case ToolCallEnded():
                self.total[f"calls of {event.name}"] += 1


async def main() -> None:
    """Runs an agent, and prints its answer and what it cost."""
    enable_logging()
    meter = Meter()
    # The client reports requests, and the agent reports runs and calls.
    async with LLMClient(observers=[meter]) as client:
        agent = Agent(client, tools=[count_people], max_rounds=8, on_limit="answer", observers=[meter])
        print((await agent.run("How many people live in Oslo?", max_tokens=200)).text)
    print(*(f"{count:5} {name}" for name, count in meter.total.items()), sep="\n")
    print(f"{meter.seconds_waited:5.2f} seconds in the queue")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except LLMError as error:
        sys.exit(f"observer: {error}")
