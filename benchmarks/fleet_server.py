"""A real model behind a front that decides what it calls, so that every framework has the same runs.

The model consists of the first layers of one with 135 million parameters. It processes prompts as a large one does, but
what it writes makes no sense. So the front passes the conversation on, waits for the answer of the model, and then
replies with a call of the tool or, in the last round, with a text. It runs in a separate process, which prints its
address as a line of JSON, answers each line "tokens" with the number of prompt tokens that the model had to process so
far, and ends at any other line, or when its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final

import aiohttp

from benchmarks.processes import SERVER_CORE, MeasurementError, PinnedProcess
from benchmarks.shallow_model import write_shallow_model
from lmbridge.local import LocalServer
from lmbridge.local.model import locate_model
from lmbridge.testing import Exchange, ScriptedServer, answer

TOOL: Final = "look_up"
"""The name of the tool that is called in each round but the last. It has one argument, `number`."""
_LAYERS: Final = 4
"""The number of layers, out of 30, that are kept. With all, a core processes 160 tokens a second, and a round takes two
hours."""
_TOKENS: Final = 16
_START_SECONDS: Final = 120.0
_ANSWER_SECONDS: Final = 30.0


class _UncachedServer(LocalServer):
    """A server that keeps only the conversations that its slots have processed last."""

    _child: ClassVar[Path] = Path(__file__).parent / "uncached_child.py"


class FleetServer(PinnedProcess):
    """A new server in a separate process.

    Args:
        slots: The number of requests that it processes at the same time.
        has_cache: Whether it keeps the conversations of earlier requests besides those in its slots.
        rounds: The number of rounds of each run whose number is even; the others have one more.

    Raises:
        MeasurementError: The server did not start.
    """

    def __init__(self, slots: int, *, has_cache: bool, rounds: int) -> None:
        arguments = (str(slots), str(int(has_cache)), str(rounds))
        super().__init__(SERVER_CORE, "-m", "benchmarks.fleet_server", *arguments)
        line = self.read(_START_SECONDS)
        if not line:
            raise MeasurementError("the server did not start")
        ready = json.loads(line)
        self.api_base: str = ready["api_base"]
        self.model: str = ready["model"]

    def evaluated_tokens(self) -> int:
        """Returns how many tokens of prompts the model had to process so far."""
        self.write("tokens")
        return int(self.read(_ANSWER_SECONDS))

    def close(self) -> None:
        """Lets the server end its own process before it is killed."""
        self.write("end")
        self.read(_ANSWER_SECONDS)
        super().close()


class _Front:
    """Passes conversations on to a model, and replies with what the run needs next."""

    def __init__(self, server: LocalServer, http: aiohttp.ClientSession, rounds: int) -> None:
        self.evaluated_tokens: int = 0
        self._server = server
        self._http = http
        self._rounds = rounds

    async def reply(self, exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        body = {
            "messages": [_plain(message) for message in messages],
            "max_tokens": _TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
        usage = None
        async with self._http.post(f"{self._server.api_base}/chat/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    # The first chunk tells clients that the prompt has been processed.
                    if exchange.request.json.get("stream") and not exchange.started:
                        await exchange.chunk({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
                    self.evaluated_tokens += chunk.get("timings", {}).get("prompt_n", 0)
                    usage = chunk.get("usage") or usage
        called = sum(message["role"] == "tool" for message in messages)
        if called < self._rounds + _task_number(messages) % 2 - 1:
            function = {"name": TOOL, "arguments": json.dumps({"number": called})}
            call = {"id": f"call_{called}", "type": "function", "function": function}
            await answer("", tool_calls=[call], usage=usage)(exchange)
        else:
            await answer("Done.", usage=usage)(exchange)


def _task_number(messages: Sequence[Mapping[str, Any]]) -> int:
    """Returns the number in the task of a conversation, which begins with "Task" and this number."""
    task = next(_plain(message)["content"] for message in messages if message["role"] == "user")
    return int(task.removeprefix("Task ").partition(":")[0])


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """Returns a message that every template can render, whatever the framework has sent."""
    role = message["role"] if message["role"] in {"system", "user", "assistant"} else "user"
    content = message.get("content") or "I look it up."
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return {"role": role, "content": content}


@asynccontextmanager
async def _running(slots: int, rounds: int, *, has_cache: bool) -> AsyncIterator[tuple[ScriptedServer, _Front]]:
    kind = LocalServer if has_cache else _UncachedServer
    with TemporaryDirectory() as folder:
        model = Path(folder, "shallow.gguf")
        write_shallow_model(await locate_model(), model, _LAYERS)
        async with (
            kind(model, n_parallel=slots, threads=1) as server,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(), connector=aiohttp.TCPConnector(limit=0)) as http,
            ScriptedServer([server.model]) as scripted,
        ):
            front = _Front(server, http, rounds)
            scripted.default = front.reply
            yield scripted, front


async def _serve(slots: int, rounds: int, *, has_cache: bool) -> None:
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[str] = asyncio.Queue()
    loop.add_reader(sys.stdin, lambda: commands.put_nowait(sys.stdin.readline()))
    async with _running(slots, rounds, has_cache=has_cache) as (server, front):
        print(json.dumps({"api_base": server.api_base, "model": server.models[0]}), flush=True)
        while (await commands.get()).strip() == "tokens":
            print(front.evaluated_tokens, flush=True)
        loop.remove_reader(sys.stdin)
    print(flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[3]), has_cache=sys.argv[2] == "1"))
