"""Mixed traffic for a long time, while everything that can be killed is killed: `make soak`.

One process makes plain requests, streams, agent runs and runs with MCP tools, directly and through the gateway, and
cancels many of them at a random moment. Meanwhile the model server, the MCP servers and an embedded server are killed
and started again, and models are switched. From time to time the traffic pauses, and what the process holds is counted:
memory, descriptors, tasks, threads and children. After the first quarter, for warming up, none of them may grow.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import attrs

from lmbridge import Agent, DynamicAutonomousAgent, Limits, LLMClient, LLMError, LocalServer, Timeouts
from lmbridge.gateway import Gateway
from lmbridge.transport.session import KEEPALIVE_SECONDS
from tests.agent.support import add
from tests.mcp.support import scripted
from tests.reliability import report
from tests.reliability.leftovers import Holdings, complaints, holdings, resident_kib, return_free_memory
from tests.reliability.line_chart import draw_lines
from tests.reliability.soak_server import MODELS
from tests.support import MESSAGES

CHART: Final = report.PAGE.parent / "soak.svg"
_WORKERS: Final = 24
_SAMPLE_SECONDS: Final = 20.0
"""The seconds of traffic between two samples."""
_IDLE_SECONDS: Final = 2 * KEEPALIVE_SECONDS + 1
"""The seconds after which the last idle connection is closed: aiohttp looks for them every `KEEPALIVE_SECONDS`."""
_KILL_SECONDS: Final = 5.0
"""The mean seconds between two kills."""
_CANCEL_SHARE: Final = 0.3
"""The share of the operations that are cancelled."""
_SLOPES: Final = {"MiB": 6.0, "descriptors": 12.0, "tasks": 12.0, "threads": 6.0, "children": 6.0}
"""How much each figure may grow in an hour, which is less than one for every thousandth operation."""
_TIMEOUTS: Final = Timeouts(connect=5, first_byte=30, idle=30)


@attrs.frozen
class Sample:
    """What the process held at one moment."""

    minutes: float
    mib: float
    held: Holdings

    def figures(self) -> dict[str, float]:
        return {"MiB": self.mib, **attrs.asdict(self.held)}


class Soak:
    """The traffic, and what is killed meanwhile."""

    def __init__(self, folder: Path, *, local: bool) -> None:
        self.outcomes: Counter[str] = Counter()
        self.findings: list[str] = []
        self.kills: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self._folder = folder
        self._with_local = local
        self._port = _free_port()
        self._server: asyncio.subprocess.Process | None = None
        self._local: LocalServer | None = None
        self._operations: list[Callable[[], Awaitable[object]]] = []
        self._may_work = asyncio.Event()
        self._may_work.set()
        self._working = 0
        self._is_idle = asyncio.Event()

    async def run(self, minutes: float) -> None:
        async with AsyncExitStack() as stack:
            await self._open(stack)
            began = time.monotonic()
            tasks = [asyncio.create_task(self._work()) for _ in range(_WORKERS)]
            tasks.append(asyncio.create_task(self._kill_now_and_then()))
            try:
                while (seconds := time.monotonic() - began) < minutes * 60:
                    await asyncio.sleep(min(_SAMPLE_SECONDS, minutes * 6))
                    self.samples.append(await self._sample((time.monotonic() - began) / 60))
                    report.progress(f"{seconds:.0f} s: {self.samples[-1].figures()} {dict(self.outcomes)}")
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                self.findings += [repr(each) for each in results if not isinstance(each, asyncio.CancelledError)]

    async def _open(self, stack: AsyncExitStack) -> None:
        base = f"http://127.0.0.1:{self._port}/v1"
        stack.push_async_callback(self._stop_server)
        await self._start_server()
        limits = Limits(max_concurrency=8, max_loaded_models=1, max_wait=0.2)
        client = await stack.enter_async_context(LLMClient(base, MODELS[0], limits=limits, timeout=_TIMEOUTS))
        gateway = await stack.enter_async_context(Gateway(upstreams=[base], limits=limits))
        through = await stack.enter_async_context(LLMClient(gateway.api_base, MODELS[0], timeout=_TIMEOUTS))
        config = self._folder / "mcp.json"
        config.write_text(
            json.dumps({"mcpServers": {"one": scripted({"tools": ["echo"]}), "two": scripted({"tools": ["echo"]})}})
        )
        self._dynamic = DynamicAutonomousAgent(client, config_path=config)
        stack.push_async_callback(self._dynamic.close)
        agent = Agent(client, tools=[add])
        operations: list[Callable[[], Awaitable[object]]] = [
            lambda: client.chat_completion(MESSAGES, model=random.choice(MODELS)),
            lambda: self._read(client),
            lambda: self._read(client),
            lambda: through.chat_completion(MESSAGES, model=random.choice(MODELS)),
            lambda: self._read(through),
            lambda: agent.run("Add."),
            lambda: self._leave_run(agent),
            lambda: agent.switch_model(random.choice(MODELS)),
            lambda: self._dynamic.autonomous_with_mcp(random.choice(("one", "two")), "Go."),
            lambda: self._dynamic.autonomous_discover_and_execute("Go."),
            lambda: self._short_life(base),
        ]
        if self._with_local:
            self._local = LocalServer(n_ctx=1024, n_parallel=1)
            stack.push_async_callback(self._local.close)
            await self._local.__aenter__()
            operations.append(self._ask_local)
        self._operations = operations

    # The operations

    async def _read(self, client: LLMClient) -> None:
        """Reads a stream, to its end or not."""
        stop_after = random.choice((1, 5, 1000))
        async with client.stream_chat(MESSAGES, model=random.choice(MODELS)) as stream:
            async for _ in stream:
                stop_after -= 1
                if not stop_after:
                    break

    async def _leave_run(self, agent: Agent) -> None:
        async with agent.stream("Add.") as events:
            async for _ in events:
                if random.random() < 0.2:
                    break

    async def _short_life(self, base: str) -> None:
        async with LLMClient(base, MODELS[0], timeout=_TIMEOUTS) as client:
            await client.list_models()
            await client.server_info()

    async def _ask_local(self) -> None:
        if self._local is not None:
            async with LLMClient(self._local.api_base, self._local.model, timeout=_TIMEOUTS, max_retries=0) as client:
                await client.ask("Hello?", max_tokens=3)

    async def _work(self) -> None:
        while True:
            await self._may_work.wait()
            self._working += 1
            self._is_idle.clear()
            try:
                await self._do(random.choice(self._operations))
            finally:
                self._working -= 1
                if not self._working:
                    self._is_idle.set()

    async def _do(self, operation: Callable[[], Awaitable[object]]) -> None:
        async def attempt() -> None:
            await operation()

        task = asyncio.create_task(attempt())
        is_left = random.random() < _CANCEL_SHARE
        try:
            done, _ = await asyncio.wait([task], timeout=random.random() * 0.2 if is_left else 120.0)
            if not done and not is_left:
                self.findings.append("an operation took two minutes")
        finally:
            task.cancel()
            await asyncio.wait([task])
        if task.cancelled():
            self.outcomes["cancelled"] += 1
        elif (error := task.exception()) is None:
            self.outcomes["done"] += 1
        elif isinstance(error, LLMError):
            self.outcomes["named error"] += 1
        else:
            self.findings.append(f"{error!r}")

    # Killing

    async def _kill_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 2 * _KILL_SECONDS))
            await self._may_work.wait()
            await random.choice((self._kill_server, self._kill_mcp, self._kill_local))()

    async def _kill_server(self) -> None:
        assert self._server is not None
        self._server.kill()
        await self._server.wait()
        self.kills["model server"] += 1
        await asyncio.sleep(random.random())
        await self._start_server()

    async def _kill_mcp(self) -> None:
        pids = [status.pid for status in self._dynamic._hub.status().values() if status.pid]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            self.kills["MCP server"] += 1

    async def _kill_local(self) -> None:
        if self._local is None or self._local._process is None:
            return
        self._local._process.kill()
        self.kills["embedded server"] += 1
        await asyncio.sleep(random.random())
        await self._local.close()
        await self._local.__aenter__()

    async def _start_server(self) -> None:
        self._server = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.reliability.soak_server",
            str(self._port),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._server.stdout is not None
        await self._server.stdout.readline()

    async def _stop_server(self) -> None:
        if self._server is not None and self._server.returncode is None:
            self._server.kill()
            await self._server.wait()

    # Counting

    async def _sample(self, minutes: float) -> Sample:
        """Lets the operations end, and counts what the process holds."""
        self._may_work.clear()
        try:
            async with asyncio.timeout(150):
                while self._working:
                    await self._is_idle.wait()
            await asyncio.sleep(_IDLE_SECONDS)
            gc.collect()
            return_free_memory()
            return Sample(minutes, resident_kib() / 1024, holdings())
        finally:
            self._may_work.set()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def slope_an_hour(minutes: Sequence[float], values: Sequence[float]) -> float:
    """Returns by how much the values grow in an hour, by least squares."""
    if len(minutes) < 2:
        return 0.0
    mean_x, mean_y = sum(minutes) / len(minutes), sum(values) / len(values)
    spread = sum((x - mean_x) ** 2 for x in minutes)
    return 60 * sum((x - mean_x) * (y - mean_y) for x, y in zip(minutes, values, strict=True)) / spread


async def soak(minutes: float, *, local: bool = True) -> Soak:
    """Runs the traffic, and returns what has been counted."""
    with tempfile.TemporaryDirectory() as folder, complaints() as found:
        soaked = Soak(Path(folder), local=local)
        await soaked.run(minutes)
    soaked.findings += found
    return soaked


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/reliability.md")
    arguments = parser.parse_args()
    began = time.monotonic()
    soaked = asyncio.run(soak(arguments.minutes))
    warm = soaked.samples[len(soaked.samples) // 4 :]
    lines, grown = [["", "first", "after warming up", "last", "slope an hour"]], []
    for name, limit in _SLOPES.items():
        values = [sample.figures()[name] for sample in warm]
        slope = slope_an_hour([sample.minutes for sample in warm], values)
        if slope > limit:
            grown.append(f"{name} grow by {slope:.1f} an hour")
        shown = [soaked.samples[0].figures()[name], values[0], values[-1], slope]
        lines.append(
            [
                name,
                *(
                    f"{value:.1f}" if name == "MiB" or index == 3 else f"{value:.0f}"
                    for index, value in enumerate(shown)
                ),
            ]
        )
    notes = [
        f"operations: {', '.join(f'{count:,} {name}' for name, count in soaked.outcomes.items())}",
        f"killed and started again: {', '.join(f'{count} times the {name}' for name, count in soaked.kills.items())}",
        f"{len(soaked.samples)} samples, of which the first quarter is for warming up",
        f"other exceptions, warnings, lost exceptions of tasks: {len(soaked.findings)}",
    ]
    report.publish("soak", lines, notes, began, write=arguments.write)
    if arguments.json:
        arguments.json.write_text(json.dumps([attrs.asdict(sample) for sample in soaked.samples]))
    if arguments.write:
        CHART.write_text(
            draw_lines(
                [s.minutes for s in soaked.samples], {n: [s.figures()[n] for s in soaked.samples] for n in _SLOPES}
            )
        )
    for finding, count in Counter(soaked.findings).most_common(20):
        print(f"  {count} times: {finding}", file=sys.stderr)
    if soaked.findings or grown:
        sys.exit("; ".join([*grown, f"{len(soaked.findings)} findings"]))


if __name__ == "__main__":
    main()
