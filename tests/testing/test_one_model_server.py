"""`OneModelServer` as an HTTP client sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from lmbridge.testing import Exchange, OneModelServer, answer
from lmbridge.testing.one_model_server import Ending

Reply = tuple[int, str]


async def ask(http: aiohttp.ClientSession, server: OneModelServer, model: str, *, stream: bool = True) -> Reply:
    """Sends a request, and returns the status and the body. A broken connection raises an exception."""
    body = {"model": model, "stream": stream}
    async with http.post(f"{server.api_base}/chat/completions", json=body) as response:
        return response.status, await response.text()


def content(body: str) -> str:
    """Returns the content of a stream, up to where it ends."""
    events = [event.removeprefix("data: ") for event in body.split("\n\n") if event]
    chunks: list[Any] = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if "choices" in chunk)


def instant(**options: Any) -> OneModelServer:
    """Returns a server that takes no time to load models and to generate."""
    return OneModelServer(load_seconds=0, token_seconds=0, **options)


class Held:
    """A generation that has begun, and goes on when the test allows it."""

    def __init__(self, http: aiohttp.ClientSession, server: OneModelServer, model: str, *, stream: bool = True) -> None:
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self._server = server
        server.script(self._behave)
        self.task = asyncio.create_task(ask(http, server, model, stream=stream))

    async def _behave(self, exchange: Exchange) -> None:
        self.begun.set()
        await answer("one two", gate=self.gate)(exchange)


async def held(http: aiohttp.ClientSession, server: OneModelServer, model: str, *, stream: bool = True) -> Held:
    generation = Held(http, server, model, stream=stream)
    await generation.begun.wait()
    return generation


async def test_a_model_is_loaded_once_and_answers_completely(http: aiohttp.ClientSession) -> None:
    async with instant(tokens=3) as server:
        for _ in range(2):
            status, body = await ask(http, server, "model-a")
            assert (status, content(body)) == (200, "model-a 1 2")
            assert body.endswith("data: [DONE]\n\n")
        _, body = await ask(http, server, "model-a", stream=False)
        assert json.loads(body)["choices"][0]["message"]["content"] == server.text("model-a")
        assert (server.loads, server.loaded, server.swaps, server.kills) == (["model-a"], ["model-a"], 0, [])


async def test_an_idle_model_is_dropped_without_a_kill(http: aiohttp.ClientSession) -> None:
    async with instant() as server:
        for model in ("model-a", "model-b", "model-a"):
            assert content((await ask(http, server, model))[1]) == server.text(model)
        assert server.loads == ["model-a", "model-b", "model-a"]
        assert (server.swaps, server.kills, server.double_loads) == (2, [], 0)


async def test_a_killed_stream_can_end_with_an_error_event(http: aiohttp.ClientSession) -> None:
    async with instant(endings=["error"]) as server:
        a = await held(http, server, "model-a")
        assert content((await ask(http, server, "model-b"))[1]) == server.text("model-b")
        status, body = await a.task
        assert status == 200
        told = json.loads(body.split("\n\n")[-2].removeprefix("data: "))
        assert told == {"error": {"message": "Model unloaded."}, "message": "Model unloaded."}
        assert 'finish_reason":"' not in body
        assert (server.swaps, server.kills) == (1, [server.requests[0]])


async def test_a_killed_stream_can_end_without_a_finish_reason(http: aiohttp.ClientSession) -> None:
    async with instant(endings=["cut"]) as server:
        a = await held(http, server, "model-a")
        await ask(http, server, "model-b")
        _, body = await a.task
        assert "[DONE]" not in body
        assert "error" not in body
        assert 'finish_reason":"' not in body


async def test_a_killed_stream_can_end_with_a_broken_connection(http: aiohttp.ClientSession) -> None:
    async with instant(endings=["reset"]) as server:
        a = await held(http, server, "model-a")
        await ask(http, server, "model-b")
        with pytest.raises(aiohttp.ClientError):
            await a.task


async def test_a_killed_plain_request_gets_an_error(http: aiohttp.ClientSession) -> None:
    async with instant(endings=["error"]) as server:
        a = await held(http, server, "model-a", stream=False)
        await ask(http, server, "model-b")
        status, body = await a.task
        assert (status, json.loads(body)) == (400, {"error": "Model unloaded."})


@pytest.mark.parametrize("ending", ["cut", "reset"])
async def test_a_killed_plain_request_can_get_no_reply(http: aiohttp.ClientSession, ending: Ending) -> None:
    async with instant(endings=[ending]) as server:
        a = await held(http, server, "model-a", stream=False)
        await ask(http, server, "model-b")
        with pytest.raises(aiohttp.ClientConnectionError):
            await a.task


async def test_a_model_that_is_being_loaded_is_dropped_as_well(http: aiohttp.ClientSession) -> None:
    async with OneModelServer(load_seconds=60, endings=["error"]) as server:
        a = asyncio.create_task(ask(http, server, "model-a"))
        await server.wait_until(lambda: server.loads)
        b = asyncio.create_task(ask(http, server, "model-b"))
        assert (await a)[0] == 400
        assert (server.loads, server.loaded, len(server.kills)) == (["model-a", "model-b"], [], 1)
        b.cancel()
        await server.wait_until(lambda: server.aborts)


async def test_first_requests_that_arrive_together_each_load_the_model(http: aiohttp.ClientSession) -> None:
    async with OneModelServer(load_seconds=0.01, token_seconds=0) as server:
        replies = await asyncio.gather(*(ask(http, server, "model-a") for _ in range(3)))
        assert {content(body) for _, body in replies} == {server.text("model-a")}
        assert (server.loads, server.double_loads, server.swaps) == (["model-a"] * 3, 2, 0)


async def test_requests_beyond_the_parallel_ones_wait(http: aiohttp.ClientSession) -> None:
    async with instant(parallel=1) as server:
        first = await held(http, server, "model-a")
        second = Held(http, server, "model-a")
        await server.wait_until(lambda: server.in_flight == 2)
        assert not second.begun.is_set()
        first.gate.set()
        await second.begun.wait()
        second.gate.set()
        await asyncio.gather(first.task, second.task)


async def test_the_seed_draws_the_endings(http: aiohttp.ClientSession) -> None:
    async def endings(seed: int) -> list[str]:
        seen = []
        async with instant(seed=seed) as server:
            for _ in range(12):
                a = await held(http, server, "model-a")
                await ask(http, server, "model-b")
                try:
                    seen.append("error" if "unloaded" in (await a.task)[1] else "cut")
                except aiohttp.ClientError:
                    seen.append("reset")
        return seen

    first = await endings(1)
    assert set(first) == {"error", "cut", "reset"}
    assert await endings(1) == first
    assert await endings(2) != first


async def test_an_idle_model_is_dropped_before_a_busy_one(http: aiohttp.ClientSession) -> None:
    async with instant(models=["a", "b", "c"], capacity=2) as server:
        a = await held(http, server, "a")
        await ask(http, server, "b")
        await ask(http, server, "c")
        assert server.loaded == ["a", "c"]
        a.gate.set()
        assert content((await a.task)[1]) == "one two"
        await ask(http, server, "b")
        assert server.loaded == ["c", "b"]
        assert (server.swaps, server.kills) == (2, [])


async def test_a_client_that_leaves_ends_its_generation(http: aiohttp.ClientSession) -> None:
    async with instant() as server:
        a = await held(http, server, "model-a")
        a.task.cancel()
        await server.wait_until(lambda: server.aborts)
        await ask(http, server, "model-b")
        assert server.kills == []


async def test_the_exception_of_a_behaviour_is_kept(http: aiohttp.ClientSession) -> None:
    error = ValueError("no such script")

    async def fail(_: Exchange) -> None:
        raise error

    async with instant() as server:
        server.script(fail)
        assert (await ask(http, server, "model-a"))[0] == 500
        assert server.errors == [error]
        server.errors.clear()


async def test_listing_the_models_loads_none(http: aiohttp.ClientSession) -> None:
    async with instant() as server, http.get(f"{server.api_base}/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["model-a", "model-b"]
        assert server.loads == []
