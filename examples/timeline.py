"""Runs three agents at once, and writes a page that shows what each of them did when.

    python examples/timeline.py session.html
    python examples/timeline.py session.html --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

Open the page in a browser, and click a bar to see its text. Without `--api-base`, and without LMBRIDGE_API_BASE in the
environment, it starts the server of `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from lmbridge import Agent, LLMClient, LLMError, LocalServer
from lmbridge.observe import TimelineObserver

PEOPLE = {"ulm": 130_000, "oslo": 720_000, "vienna": 2_000_000}


async def count_people(city: str) -> str:
    """Counts the people of a city."""
    await asyncio.sleep(0.1)
    return f"{PEOPLE[city.lower()]:,}"


async def work(api_base: str, model: str | None, page: Path) -> None:
    """Asks about each city, and writes the page even if an answer fails."""
    observer = TimelineObserver()
    try:
        async with LLMClient(api_base, model, observers=[observer]) as client:
            agent = Agent(client, tools=[count_people], max_tokens=100, observers=[observer])
            async with asyncio.TaskGroup() as group:
                runs = [group.create_task(agent.run(f"How many people live in {city}?")) for city in PEOPLE]
        for run in runs:
            print(run.result().text)
    finally:
        observer.write(page, "Three agents")
        print(f"written: {page}")


async def main() -> None:
    """Reads the options, and starts a server if none is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="the HTML file to write")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"))
    parser.add_argument("--model")
    options = parser.parse_args()
    if options.api_base:
        await work(options.api_base, options.model, options.page)
    else:
        async with LocalServer() as server:
            await work(server.api_base, server.model, options.page)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* (LLMError, ImportError) as errors:
        sys.exit(f"timeline: {errors.exceptions[0]}")
