"""Every public coroutine and async generator, cancelled at every step: `make cancel-sweep`.

Each operation is cancelled at its first step, at its second, and so on until one run is not reached any more; and each
time in one of the `WAYS`. What has to hold each time:

- What comes out is the cancellation, as `CancelledError`, as `TimeoutError`, or as the error of the sibling.
- The objects can be used afterwards: the operation succeeds.
- Nothing is left: no task, descriptor, thread or child more than after an operation that was not cancelled, no permit,
  no warning, no exception that nobody has seen.

All of that happens in asyncio's loop in debug mode, and in that of uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import attrs
import uvloop

from lmbridge import (
    Agent,
    Choice,
    DynamicAutonomousAgent,
    Journal,
    Limits,
    LLMClient,
    LLMClientPool,
    LLMResponseError,
    LocalServer,
    ModelValidator,
    NodePool,
    TaskCancelledError,
    Transport,
    collect,
    discover,
    pick_tools,
)
from lmbridge.client import lmstudio, model_backends
from lmbridge.client.auto_limits import auto_limits
from lmbridge.fleet import map_runs
from lmbridge.gateway import Gateway
from lmbridge.mcp import McpHub
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, sse
from tests.agent.support import add, asks, calls
from tests.client import test_lmstudio as of_lmstudio
from tests.client.test_client_models import Router, loading
from tests.client.test_responses import ALL, WHOLE
from tests.mcp.support import scripted
from tests.reliability import report
from tests.reliability.cancelling import WAYS, Operation, Way, cancel_at
from tests.reliability.leftovers import complaints, holdings, settled_holdings
from tests.support import MESSAGES
from tests.transport.test_forwarding import request as forwarded

LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
_MOST_STEPS: Final = 5000
_numbers: Final = itertools.count()


@attrs.frozen
class World:
    """What the operations work with."""

    server: ScriptedServer
    other: ScriptedServer
    """Another server, for operations that need two, or one with an API of its own."""
    client: LLMClient
    folder: Path
    stack: AsyncExitStack

    @property
    def config(self) -> Path:
        return self.folder / "mcp.json"


Prepare = Callable[[World], Operation]


async def _behave(exchange: Exchange) -> None:
    """Answers as a model that calls the first tool that it is offered once."""
    body = exchange.request.json
    tools, messages = body.get("tools"), body.get("messages")
    if exchange.request.path.endswith("/embeddings"):
        await reply(200, {"data": [{"index": 0, "embedding": [1.0]}], "model": "test-model"})(exchange)
    elif exchange.request.path.endswith("/responses"):
        await (sse(*ALL) if body.get("stream") else reply(200, WHOLE))(exchange)
    elif exchange.request.path.endswith("/v1/completions"):
        choice = {"index": 0, "text": "one two three", "finish_reason": "stop"}
        await reply(200, {"object": "text_completion", "model": "test-model", "choices": [choice]})(exchange)
    elif tools and messages[-1]["role"] != "tool":
        name = tools[0]["function"]["name"]
        await calls(asks(name, **({"text": "hello"} if name == "echo" else {"a": 1, "b": 2})))(exchange)
    else:
        await answer("7" if "response_format" in body else "one two three")(exchange)


def _of_client(call: Callable[[LLMClient], Any]) -> Prepare:
    return lambda world: lambda: call(world.client)


async def _read(stream: Any) -> None:
    async with stream as opened:
        async for _ in opened:
            pass


async def _read_text(client: LLMClient) -> None:
    async with client.stream_chat(MESSAGES) as stream:
        async for _ in stream.text():
            pass


async def _respond(client: LLMClient) -> None:
    await client.create_response("Say hello.")
    await collect(await client.create_response("Say hello.", stream=True))


async def _ask_server(client: LLMClient) -> None:
    await client.list_models()
    await client.health_check()
    await client.server_info()
    await client.server_infos()
    await client.count_tokens(MESSAGES)


async def _decide(client: LLMClient) -> None:
    # The server sends no log probabilities, which is found out only when its answer is there.
    with suppress(LLMResponseError):
        await client.decide("a", {"x": Choice("which?", ["one", "two"])})
    with suppress(LLMResponseError):
        await pick_tools(client, "Add.", [add, _subtract], limit=1)


def _subtract(a: int, b: int) -> int:
    return a - b


def _new_client(world: World) -> Operation:
    client = LLMClient(world.server.api_base, "test-model")

    async def live() -> None:
        async with client:
            await client.ask("?")

    return live


def _pool(world: World) -> Operation:
    pool = LLMClientPool(1, api_base=world.server.api_base)
    world.stack.push_async_callback(pool.close)

    async def lease() -> None:
        async with pool.client("test-model") as client:
            await client.ask("?")
        client = await pool.get_client("test-model")
        pool.release_client(client)

    return lease


def _validator(world: World) -> Operation:
    validator = ModelValidator(client=world.client)

    async def validate() -> None:
        validator.invalidate()
        await validator.validate_model("test-model")
        await validator.get_available_models()
        await validator.get_loaded_models()

    return validate


def _two_servers(world: World) -> Operation:
    world.other.default = _behave

    async def live() -> None:
        transports = [Transport(server.api_base, limits=auto_limits()) for server in (world.server, world.other)]
        async with NodePool(transports) as nodes:
            await transports[0].learn_limits()
            client = LLMClient(transport=nodes, model="test-model")
            await client.ask("?")
            await collect(await client.chat_completion(MESSAGES, stream=True))
            await client.list_models()
            async with await nodes.forward(forwarded(b'{"model": "test-model", "messages": []}')) as response:
                while await response.read():
                    pass

    return live


def _without_waiting(world: World) -> None:
    """Makes the client ask without a pause how far a server is."""
    for module in (lmstudio, model_backends):
        world.stack.enter_context(patch.object(module, "POLL_SECONDS", 0.001))
    world.stack.enter_context(patch.object(model_backends, "_LOAD_POLL_SECONDS", 0.001))


def _router(world: World) -> Operation:
    _without_waiting(world)
    router = Router(world.other)
    router.events = [loading(0.5), loading(1.0)]
    client = LLMClient(world.other.api_base, max_retries=0)
    world.stack.push_async_callback(client.close)

    async def manage() -> None:
        router.statuses = {"small": {"value": "unloaded"}}
        router.model, router.next = "small", [{"value": "loading"}, {"value": "loaded"}]
        await client.models.list()
        await client.models.capabilities()
        await client.models.load("small", progress=lambda _: None)
        router.next = [{"value": "unloaded"}]
        await client.models.unload("small")
        router.next = [{"value": "downloading"}, {"value": "unloaded"}]
        await _exhaust(client.models.download("new"))
        await _exhaust(client.models.loading())

    return manage


def _lm_studio(world: World) -> Operation:
    _without_waiting(world)
    server = world.other
    server.on_path(of_lmstudio.V1, reply(200, {"models": [of_lmstudio.GEMMA]}))
    server.on_path(of_lmstudio.LOAD, reply(200, of_lmstudio.LOADED))
    server.on_path(of_lmstudio.UNLOAD, reply(200, {"instance_id": "gemma"}))
    server.on_path(of_lmstudio.DOWNLOAD, reply(200, of_lmstudio.status("downloading")))
    server.on_path(of_lmstudio.STATUS, reply(200, of_lmstudio.status("completed")))
    client = LLMClient(server.api_base, max_retries=0)
    world.stack.push_async_callback(client.close)

    async def manage() -> None:
        await client.lmstudio.models()
        await client.lmstudio.load("gemma")
        await client.lmstudio.unload("gemma")
        await _exhaust(client.lmstudio.download("gemma"))

    return manage


async def _exhaust(items: AsyncGenerator[Any, None]) -> None:
    async with aclosing(items) as opened:
        async for _ in opened:
            pass


def _agent(use: Callable[[Agent, World], Any]) -> Prepare:
    def prepare(world: World) -> Operation:
        agent = Agent(world.client, tools=[add], switch_policy="drain")
        return lambda: use(agent, world)

    return prepare


async def _start_run(agent: Agent, _world: World) -> None:
    handle = agent.start("Go.")
    try:
        await handle.wait_begun()
        async for _ in handle.events():
            pass
        await handle.result()
        await handle.aclose()
    except asyncio.CancelledError:
        # A run that was started goes on without those who watch it.
        handle.cancel()
        raise


async def _switch(agent: Agent, _: World) -> None:
    await agent.run("Go.")
    await agent.switch_model("test-model")


async def _journal(agent: Agent, world: World) -> None:
    path = world.folder / f"{next(_numbers)}.db"
    assert (await agent.run("Go.", journal=path)).text
    handle = agent.start("Go.", journal=path)
    try:
        await anext(aiter(handle.events()))
    finally:
        handle.cancel()
    with suppress(TaskCancelledError):
        await handle.result()
    assert (await Agent.resume(path, client=world.client, tools=[add])).text
    journal = Journal(path)
    await journal.export((await journal.runs())[-1].id)


async def _fleet(agent: Agent, _: World) -> None:
    async with aclosing(map_runs(["a", "b", "c"], lambda: agent, max_in_flight=2)) as outcomes:
        async for outcome in outcomes:
            assert outcome.error is None, outcome.error


def _dynamic(world: World) -> Operation:
    agent = DynamicAutonomousAgent(world.client, config_path=world.config)

    async def run() -> None:
        await agent.list_available_mcps()
        assert await agent.autonomous_with_mcp("a", "Go.")
        await agent.close()

    return run


def _several(world: World) -> Operation:
    agent = DynamicAutonomousAgent(world.client, config_path=world.config)
    world.stack.push_async_callback(agent.close)

    async def run() -> None:
        assert await agent.autonomous_with_multiple_mcps(["a", "b"], "Go.")
        await _read(await agent.autonomous_discover_and_execute("Go.", stream=True))

    return run


def _hub(world: World) -> Operation:
    async def use() -> None:
        hub = McpHub(world.config)
        assert await hub.names() == ["a", "b"]
        try:
            await hub.reload()
            lease = await hub.tools()
            await lease.tools[0].function(text="hello")
            await lease.new_tools()
            lease.release()
        finally:
            # A hub that is closed cannot be opened again, so it belongs to the operation, also if that is cancelled.
            await hub.close()

    return use


def _gateway(world: World) -> Operation:
    async def live() -> None:
        async with Gateway(world.server.api_base, limits=Limits()) as gateway:
            async with LLMClient(gateway.api_base, "test-model") as client:
                await client.ask("?")
                await collect(await client.chat_completion(MESSAGES, stream=True))
            await gateway.drain()

    return live


def _local_server(_: World) -> Operation:
    server = LocalServer(n_ctx=512, n_parallel=1)

    async def live() -> None:
        async with server:
            assert server.api_base

    return live


OPERATIONS: Final[dict[str, Prepare]] = {
    "chat_completion": _of_client(lambda client: client.chat_completion(MESSAGES)),
    "chat_completion, streamed": _of_client(lambda client: _read(client.stream_chat(MESSAGES))),
    "chat_completion, the text": _of_client(_read_text),
    "create_response": _of_client(_respond),
    "text_completion": _of_client(lambda client: client.text_completion("a")),
    "embeddings": _of_client(lambda client: client.embeddings("a")),
    "ask": _of_client(lambda client: client.ask("?")),
    "parse": _of_client(lambda client: client.parse(MESSAGES, int)),
    "decide": _of_client(_decide),
    "list_models, health_check, server_info, server_infos, count_tokens": _of_client(_ask_server),
    "with_raw_response": _of_client(lambda client: client.with_raw_response.chat_completion(MESSAGES)),
    "a client, opened and closed": _new_client,
    "LLMClientPool": _pool,
    "ModelValidator": _validator,
    "NodePool": _two_servers,
    "models of a router": _router,
    "models of LM Studio": _lm_studio,
    "discover": lambda world: lambda: discover(ports=[int(world.server.origin.rpartition(":")[2])]),
    "Agent.run": _agent(lambda agent, _: agent.run("Go.")),
    "Agent.stream": _agent(lambda agent, _: _read(agent.stream("Go."))),
    "Agent.start": _agent(_start_run),
    "Agent.switch_model": _agent(_switch),
    "journal": _agent(_journal),
    "map_runs": _agent(_fleet),
    "McpHub": _hub,
    "DynamicAutonomousAgent": _dynamic,
    "DynamicAutonomousAgent, several": _several,
    "Gateway": _gateway,
    "LocalServer": _local_server,
}
SLOW: Final = ("LocalServer",)
"""The operations of which each takes seconds: a real model is loaded each time."""


@asynccontextmanager
async def opened_world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = await stack.enter_async_context(ScriptedServer())
        other = await stack.enter_async_context(ScriptedServer())
        server.default = _behave
        client = LLMClient(server.api_base, "test-model", limits=Limits(max_concurrency=4), max_retries=0)
        await stack.enter_async_context(client)
        entry = scripted({"tools": ["echo"]})
        (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"a": entry, "b": entry}}))
        yield World(server, other, client, folder, stack)


@attrs.define
class Swept:
    """What came of an operation."""

    cancelled: Counter[str] = attrs.field(factory=Counter)
    findings: list[str] = attrs.field(factory=list)


async def sweep(name: str, ways: tuple[Way, ...] = WAYS, *, step: int = 1) -> Swept:
    """Cancels an operation at every `step`th of its steps."""
    swept = Swept()
    # asyncio starts the threads of its pool one after another, up to a number that depends on the machine.
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.02) for _ in range(64)))
    with complaints() as found:
        async with opened_world() as world:
            operation = OPERATIONS[name](world)
            # Once for the connections that stay open, and for modules that are imported at their first use.
            await operation()
            before = await settled_holdings(holdings(), seconds=0.3)
            # On a busy machine, the end of a response may come too late for its connection to be kept.
            for _ in range(2):
                await operation()
                before = before.or_more(await settled_holdings(before, seconds=0.3))
            for way in ways:
                await _sweep_way(name, operation, way, world, before, swept, step)
    swept.findings += [f"{name}: {each}" for each in found]
    return swept


async def _sweep_way(
    name: str, operation: Operation, way: Way, world: World, before: Any, swept: Swept, step: int
) -> None:
    for at in range(1, _MOST_STEPS, step):
        try:
            if not await cancel_at(operation, way, at):
                return
            async with asyncio.timeout(60):
                await operation()
            assert world.client._server.transport.in_flight == 0, "a permit is left"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            swept.findings.append(f"{name}, {way} at step {at}: {error!r}")
        left = (await settled_holdings(before)).more_than(before)
        if left:
            swept.findings.append(f"{name}, {way} at step {at}: {left}")
            return
        swept.cancelled[way] += 1
        if len(swept.findings) > 20:
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.cancel_sweep", description=__doc__)
    parser.add_argument("--only", default="", help="only the operations whose name contains this")
    parser.add_argument("--loop", choices=LOOPS, help="only this event loop")
    parser.add_argument("--way", choices=WAYS, help="only this way")
    parser.add_argument("--step", type=int, default=1, help="only every STEPth step")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/reliability.md")
    arguments = parser.parse_args()
    began = time.monotonic()
    ways: tuple[Way, ...] = (arguments.way,) if arguments.way else WAYS
    loops = [arguments.loop] if arguments.loop else list(LOOPS)
    lines = [["cancelled at a step", *loops, "left behind, or wrong"]]
    findings: list[str] = []
    for name in [each for each in OPERATIONS if arguments.only in each]:
        counts: list[int] = []
        wrong = 0
        for loop in loops:
            swept = run(name, loop, ways, step=arguments.step)
            counts.append(swept.cancelled.total())
            wrong += len(swept.findings)
            findings += swept.findings
            report.progress(f"{name}, {loop}: {dict(swept.cancelled)}, {len(swept.findings)} findings")
            for finding in swept.findings[:10]:
                report.progress(f"  {finding}")
        lines.append([name, *(f"{count:,}" for count in counts), str(wrong)])
    described = f"each in {len(ways)} ways: {', '.join(ways)}"
    report.publish(
        "cancel-sweep", lines, [report.describe_step(arguments.step, "step"), described], began, write=arguments.write
    )
    if findings:
        sys.exit(f"{len(findings)} findings")


def run(name: str, loop: str, ways: tuple[Way, ...] = WAYS, *, step: int = 1) -> Swept:
    """Sweeps an operation in a new event loop, which is in debug mode if it is asyncio's."""
    with asyncio.Runner(debug=loop == "asyncio", loop_factory=LOOPS[loop]) as runner:
        return runner.run(sweep(name, ways, step=step))


if __name__ == "__main__":
    main()
