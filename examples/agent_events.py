"""Shows a run while it is in progress: the model's text, and below it a status line with the elapsed time.

    python examples/agent_events.py
    python examples/agent_events.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

The status line is drawn on stderr, and only if that is a terminal. Without `--api-base`, and without LMBRIDGE_API_BASE
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
    """Counts the people of a city, which takes half a second."""
    await asyncio.sleep(0.5)
    return f"{PEOPLE[city.lower()]:,}"


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a local server that is started for the example."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


class StatusLine:
    """The last line of the terminal, redrawn ten times a second. Without a terminal it shows nothing."""

    def __init__(self) -> None:
        self.text = ""
        self._began = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def print(self, text: str) -> None:
        """Prints a line above the status line."""
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        """Erases the status line, before something else is printed."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    async def draw(self) -> None:
        """Draws the status line until the task is cancelled."""
        for sign in cycle("|/-\\"):
            if self._is_terminal and self.text:
                seconds = time.monotonic() - self._began
                line = f"\r\033[K\033[2m{sign} {self.text} ({seconds:.1f} s)\033[0m"
                print(line, end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.1)


async def print_events(client: LLMClient, line: StatusLine) -> None:
    """Prints the events of a run. Leaving the `async with` block early would cancel the run."""
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
                    # No status line while text is being printed: it would overwrite the text.
                    line.text = ""
                    line.clear()
                    print(text, end="", flush=True)
                case ToolCallStarted(call):
                    running.append(call.name)
                    line.text = f"running: {', '.join(running)}"
                case ToolCallFinished():
                    # A call that could not be made is finished without having been started.
                    if event.call.name in running:
                        running.remove(event.call.name)
                    line.print(f"{'x' if event.is_error else '+'} {event.call.name}: {event.text}")
                case RunFinished(result):
                    line.print(
                        f"\n\n{result.stop_reason} after {result.rounds} rounds, {result.usage['total_tokens']} tokens"
                    )


async def show(client: LLMClient) -> None:
    """Runs the agent, with the status line beside it."""
    line = StatusLine()
    drawing = asyncio.create_task(line.draw())
    try:
        await print_events(client, line)
    finally:
        drawing.cancel()
        line.clear()


async def main() -> None:
    """Parses the arguments and runs the example."""
    parser = argparse.ArgumentParser(description="Shows a run while it is in progress.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of a running server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="the name of a model on that server")
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
