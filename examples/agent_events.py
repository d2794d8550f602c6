"""A run as it happens: what the model says, and a line below it that tells what is going on and for how long.

    python examples/agent_events.py
    python examples/agent_events.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

The line is drawn on stderr, and only if that is a terminal. Without `--api-base`, and without LMBRIDGE_API_BASE
in the environment, it starts the server of `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle

from lmbridge import (
    Agent,
    LLMClient,
    LLMError,
    LocalServer,
    ReasoningDelta,
    RoundStarted,
    RunFinished,
    TextDelta,
    ToolCallFinished,
    ToolCallStarted,
)

TASK = "How many people live in Ulm and Oslo together? Look both up, then answer in one sentence."
PEOPLE = {"ulm": 130_000, "oslo": 720_000}


async def count_people(city: str) -> str:
    """Counts the people of a city. It takes its time."""
    await asyncio.sleep(0.5)
    return f"{PEOPLE[city.lower()]:,}"


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """A client of the server at `api_base`, or else of one that is started here."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


class StatusLine:
    """The last line of the terminal, drawn anew ten times a second; without a terminal, nothing."""

    def __init__(self) -> None:
        self.text = ""
        self._began = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def print(self, text: str) -> None:
        """Prints a line above it."""
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        """Makes room for what is printed next."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    async def draw(self) -> None:
        """Draws it until it is cancelled."""
        for sign in cycle("|/-\\"):
            if self._is_terminal and self.text:
                seconds = time.monotonic() - self._began
                line = f"\r\033[K\033[2m{sign} {self.text} ({seconds:.1f} s)\033[0m"
                print(line, end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.1)


async def follow(client: LLMClient, line: StatusLine) -> None:
    """Shows each event; leaving the `async with` early would cancel the run."""
    running: list[str] = []
    agent = Agent(client, tools=[count_people], max_rounds=8, max_tokens=300)
    async with agent.stream(TASK) as events:
        async for event in events:
            match event:
                case RoundStarted():
                    line.text = f"round {event.round}: waiting for the model"
                case ReasoningDelta():
                    line.text = "thinking"
                case TextDelta(text):
                    line.text = ""  # what is printed moves: no line below it
                    line.clear()
                    print(text, end="", flush=True)
                case ToolCallStarted(call):
                    running.append(call.name)
                    line.text = f"running: {', '.join(running)}"
                case ToolCallFinished():
                    if event.call.name in running:  # a call that could not be made has not started
                        running.remove(event.call.name)
                    line.print(f"{'x' if event.is_error else '+'} {event.call.name}: {event.text}")
                case RunFinished(result):
                    line.print(
                        f"\n\n{result.stop_reason} after {result.rounds} rounds, {result.usage['total_tokens']} tokens"
                    )


async def show(client: LLMClient) -> None:
    """The run, and the line beside it for as long as the run goes on."""
    line = StatusLine()
    drawing = asyncio.create_task(line.draw())
    try:
        await follow(client, line)
    finally:
        drawing.cancel()
        line.clear()


async def main() -> None:
    """Reads the arguments, and shows it."""
    parser = argparse.ArgumentParser(description="Shows a run as it happens.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await show(client)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"agent_events: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
