"""The workload of a fleet: many agent runs that start together, with different long tasks, on one real server."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Final

from benchmarks.fleet_server import TOOL, FleetServer
from benchmarks.workers import serve

_SEED: Final = 2026
_TOOL_SECONDS: Final = 0.2
"""The time that the tool takes, like that of most tools that read a file or ask a service."""
_RESULT_WORDS: Final = 30
_WORDS: Final = ["river", "stone", "amber", "lantern", "copper", "willow", "harbor", "meadow", "thunder", "velvet"]

Run = Callable[[str], Awaitable[str]]
"""Runs a task to its end, and returns the text of the answer."""


def _text(words: int, seed: object) -> str:
    draw = random.Random(f"{_SEED} {seed}")
    return " ".join(draw.choices(_WORDS, k=words))


async def look_up(number: int) -> str:
    """Looks something up.

    Args:
        number: The number of the thing.
    """
    await asyncio.sleep(_TOOL_SECONDS)
    return _text(_RESULT_WORDS, number)


assert look_up.__name__ == TOOL

# Each framework is imported only in the worker that measures it.


@asynccontextmanager
async def _lmbridge(server: FleetServer, slots: int, **limits: Any) -> AsyncIterator[Run]:
    from lmbridge import Agent, Limits, LLMClient  # noqa: PLC0415 - see above

    given = Limits(max_concurrency=slots, max_queue=None, **limits)
    async with LLMClient(server.api_base, server.model, limits=given, timeout=None) as client:
        agent = Agent(client, tools=[look_up])

        async def run(task: str) -> str:
            return (await agent.run(task)).text

        yield run


@asynccontextmanager
async def _openai_agents(server: FleetServer, slots: int, *, has_semaphore: bool) -> AsyncIterator[Run]:
    # Imported here, as the comment above says.
    import openai  # noqa: PLC0415 - see above
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled  # noqa: PLC0415 - see above

    set_tracing_disabled(True)
    async with openai.AsyncOpenAI(base_url=server.api_base, api_key="none", timeout=None) as client:
        model = OpenAIChatCompletionsModel(model=server.model, openai_client=client)
        agent = Agent("worker", tools=[function_tool(look_up)], model=model)
        gate = asyncio.Semaphore(slots) if has_semaphore else nullcontext()

        async def run(task: str) -> str:
            async with gate:
                return str((await Runner.run(agent, task)).final_output)

        yield run


_FRAMEWORKS: Final[Mapping[str, Any]] = {
    "lmbridge": _lmbridge,
    "lmbridge-request": lambda server, slots: _lmbridge(server, slots, order="request"),
    "agents-semaphore": lambda server, slots: _openai_agents(server, slots, has_semaphore=True),
    "agents": lambda server, slots: _openai_agents(server, slots, has_semaphore=False),
}


class FleetWorkloads:
    """The workload of one framework.

    Args:
        framework: Its name.
    """

    def __init__(self, framework: str) -> None:
        self._framework = framework

    async def fleet(self, slots: int, has_cache: bool, runs: int, rounds: int, words: int) -> dict[str, Any]:
        """Starts all runs together, and returns when each has ended and what the server had to process.

        Args:
            slots: The slots of the server.
            has_cache: Whether the server keeps conversations besides those in its slots.
            runs: The number of runs.
            rounds: The rounds of each run whose number is even; the others have one more. In each round but the last,
                a run calls a tool.
            words: The words of each task, which are about as many tokens.
        """
        with FleetServer(slots, has_cache=has_cache, rounds=rounds) as server:
            async with _FRAMEWORKS[self._framework](server, slots) as run:
                began = time.monotonic()

                async def one(number: int) -> float | None:
                    text = await run(f"Task {number}: {_text(words, number)}")
                    return time.monotonic() - began if text == "Done." else None

                ended = await asyncio.gather(*(one(number) for number in range(runs)))
            return {"ended": ended, "tokens": server.evaluated_tokens()}


if __name__ == "__main__":
    serve(FleetWorkloads(sys.argv[1]))
