"""Reads a report that is several times as long as the model's context, and shows how the run makes room for it.

    python examples/long_run.py
    python examples/long_run.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`, whose
model is too small to read a report to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lmbridge import Agent, ContextCompacted, LLMClient, LLMError, LocalServer, RunFinished, ToolCallFinished

PAGES = 40
TASK = f"Read the pages 1 to {PAGES} of the report, one after the other. Then name the winner, which page 2 tells."


def read_page(number: int) -> str:
    """Reads a page of the report."""
    fact = "The winner is Ada. " if number == 2 else ""
    return f"Page {number}. {fact}" + "Nothing else of note happened on this day. " * 70


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a local server that is started for the example."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer(n_ctx=8192) as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def print_steps(client: LLMClient) -> None:
    """Prints the calls of a run, and what it does when the context is full."""
    agent = Agent(client, tools=[read_page], max_rounds=3 * PAGES, max_tokens=300, on_limit="answer")
    async with agent.stream(TASK) as events:
        async for event in events:
            match event:
                case ToolCallFinished(record):
                    print(f"{record.call.name}: {len(record.text)} characters")
                case ContextCompacted(step):
                    print(
                        f"[{step.kind}: {step.messages} messages, {step.tokens_before} to {step.tokens_after} tokens]"
                    )
                    if step.summary:
                        print(f"[notes: {step.summary}]")
                case RunFinished(result):
                    print(f"{result.text}\n\n{result.rounds} rounds, {len(result.messages)} messages in the result")


async def main() -> None:
    """Parses the arguments and runs the example."""
    parser = argparse.ArgumentParser(description="Reads a report that is longer than the model's context.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of a running server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="the name of a model on that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await print_steps(client)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"long_run: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
