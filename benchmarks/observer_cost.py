"""Measures what observers cost: a request, a stream and a run without any, and with one of each kind.

    python -m benchmarks.observer_cost

The requests do not leave the process, so nothing but lmbridge itself is measured. The times are CPU times. The calls of
functions of `lmbridge.observe` are counted as well; without observers there are none, on any machine.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType
from typing import Any, Final

from lmbridge import Agent, LLMClient
from lmbridge.observe import ObservedEvent, Observer, OpenTelemetryObserver, TimelineObserver
from lmbridge.testing import MockRequest, MockResponse, MockTransport

ROUNDS: Final = 15
REPEATS: Final = 100
MESSAGES: Final = [{"role": "user", "content": "What is 1 + 2?"}]
CHUNKS: Final = 100
CALL: Final = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}


class Nothing:
    """An observer that does nothing."""

    def on_event(self, event: ObservedEvent) -> None: ...


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def handler(request: MockRequest) -> Any:
    """Answers in one piece, as a stream, or as an agent needs it: first with a call, then with an answer."""
    if request.method == "GET":
        return MockResponse(404)
    if not request.json.get("stream"):
        return {"model": "m", "choices": [{"message": {"role": "assistant", "content": "3"}, "finish_reason": "stop"}]}
    if "tools" not in request.json:
        return [*(chunk({"content": "word "}) for _ in range(CHUNKS)), chunk({}, "stop")]
    if request.json["messages"][-1]["role"] == "tool":
        return [chunk({"content": "3"}), chunk({}, "stop")]
    return [chunk({"tool_calls": [{"index": 0, **CALL}]}), chunk({}, "tool_calls")]


async def request(client: LLMClient, _: Agent) -> None:
    await client.chat_completion(MESSAGES)


async def stream(client: LLMClient, _: Agent) -> None:
    async with client.stream_chat(MESSAGES) as chunks:
        async for _chunk in chunks:
            pass


async def run(_: LLMClient, agent: Agent) -> None:
    await agent.run("What is 1 + 2?")


Work = Callable[[LLMClient, Agent], Awaitable[None]]
WORK: Final[dict[str, Work]] = {
    "a request": request,
    f"a stream of {CHUNKS} chunks": stream,
    "a run with one call of a tool": run,
}
OBSERVERS: Final[dict[str, Callable[[], list[Observer]]]] = {
    "none": list,
    "one that does nothing": lambda: [Nothing()],
    "`TimelineObserver`": lambda: [TimelineObserver()],
    "`OpenTelemetryObserver`, no SDK": lambda: [OpenTelemetryObserver()],
}


def calls_of_observe(work: Work, observers: Sequence[Observer]) -> int:
    """Returns how many functions of `lmbridge.observe` are called when the work is done once."""
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and str(frame.f_globals.get("__name__", "")).startswith("lmbridge.observe")

    async def once() -> None:
        client, agent = prepare(observers)
        # What is done only once, such as imports, is not counted.
        await work(client, agent)
        sys.setprofile(profile)
        try:
            await work(client, agent)
        finally:
            sys.setprofile(None)

    asyncio.run(once())
    return count


def prepare(observers: Sequence[Observer]) -> tuple[LLMClient, Agent]:
    client = LLMClient(model="m", transport=MockTransport(handler), observers=observers)
    return client, Agent(client, tools=[add], observers=observers)


def microseconds(work: Work, observers: Sequence[Observer]) -> float:
    """Returns the CPU time that the work takes, in microseconds."""

    async def measure() -> float:
        client, agent = prepare(observers)
        for _ in range(10):
            await work(client, agent)
        began = time.process_time()
        for _ in range(REPEATS):
            await work(client, agent)
        return (time.process_time() - began) / REPEATS * 1e6

    gc.collect()
    return asyncio.run(measure())


def main() -> None:
    print(f"| observers | {' | '.join(WORK)} |")
    print(f"| --- |{' --- |' * len(WORK)}")
    times: dict[tuple[str, str], list[float]] = {}
    # Each round measures everything once, so that whatever else the machine does affects all of it alike.
    for _ in range(ROUNDS):
        for name, make in OBSERVERS.items():
            for title, work in WORK.items():
                times.setdefault((name, title), []).append(microseconds(work, make()))
    for name, make in OBSERVERS.items():
        cells = [
            f"{statistics.median(times[name, title]):,.0f} µs, {calls_of_observe(work, make())} calls"
            for title, work in WORK.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
