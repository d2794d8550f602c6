"""The model server of `make soak`: a `ScriptedServer` in a process of its own, which can be killed at any time.

It listens on the port of its first argument, prints a line when it does, and ends when its stdin does.
A conversation with tools gets a call of the first tool, and then an answer.
"""

from __future__ import annotations

import asyncio
import sys

from lmbridge.testing import Exchange, ScriptedServer, answer
from tests.agent.support import asks, calls

MODELS = ("model-a", "model-b")


async def behave(exchange: Exchange) -> None:
    """Answers as a model that calls the first tool that it is offered once."""
    body = exchange.request.json
    tools, last = body.get("tools"), body["messages"][-1]
    if tools and last["role"] != "tool":
        name = tools[0]["function"]["name"]
        arguments = {"text": "hello"} if name == "echo" else {"a": 1, "b": 2}
        await calls(asks(name, **arguments))(exchange)
        return
    await answer(" ".join(f"word{number}" for number in range(30)), model=body.get("model"), pace=0.002)(exchange)


async def main(port: int) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    server = ScriptedServer(MODELS)
    server.default = behave
    async with server, await loop.create_server(server._accept, "127.0.0.1", port, backlog=1024):
        print("ready", flush=True)
        loop.add_reader(sys.stdin, ended.set)
        while not ended.is_set():
            # The double remembers every request.
            server.requests.clear()
            server.aborts.clear()
            await asyncio.sleep(0.5)
        server.errors.clear()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
