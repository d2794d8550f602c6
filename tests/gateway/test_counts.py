"""Requests that count tokens: they need no place in the queue, and go to the server that has the model."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from lmbridge import Limits, LLMClient
from lmbridge.gateway import Gateway
from lmbridge.gateway.generations import COUNTS
from lmbridge.testing import ScriptedServer, reply, stall
from tests.gateway.support import BODY, CHAT, fetch, fetch_json
from tests.support import HALF


@pytest.mark.parametrize("path", sorted(COUNTS))
async def test_a_count_passes_byte_for_byte_while_a_generation_has_the_only_permit(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, path: str
) -> None:
    scripted_server.on_path(path, reply(200, {"input_tokens": 5, "odd": [1]}))
    scripted_server.script(stall([*HALF]))
    limits = Limits(max_concurrency=1, max_loaded_models=1)
    async with Gateway(scripted_server.api_base, limits=limits) as gateway:
        generation = asyncio.ensure_future(fetch(http, gateway, CHAT, BODY))
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        # Another model, with whose generation it would have to wait, and a "stream" that a count never is.
        body = b'{"model": "other",  "stream": true, "messages": [ ]}'
        status, headers, answer = await fetch(http, gateway, f"{path}?x=1", body)
        assert (status, json.loads(answer)) == (200, {"input_tokens": 5, "odd": [1]})
        assert headers["Content-Type"].startswith("application/json")
        received = scripted_server.requests[-1]
        assert (received.path, received.body) == (path, body)
        assert (gateway.stats().in_flight, gateway.stats().queued) == (1, 0)
        generation.cancel()
        await asyncio.wait({generation})


async def test_a_count_goes_to_the_server_that_has_the_model(http: aiohttp.ClientSession) -> None:
    async with ScriptedServer(["a"]) as first, ScriptedServer(["b"]) as second:
        path = "/v1/chat/completions/input_tokens"
        first.on_path(path, reply(200, {"input_tokens": 1}))
        second.on_path(path, reply(200, {"input_tokens": 2}))
        async with Gateway([first.api_base, second.api_base]) as gateway:
            for model, count in (("b", 2), ("a", 1), ("b", 2)):
                _, _, answer = await fetch(http, gateway, path, json.dumps({"model": model}).encode())
                assert json.loads(answer)["input_tokens"] == count


async def test_a_client_of_several_servers_asks_the_one_that_has_the_model() -> None:
    async with ScriptedServer(["a"]) as first, ScriptedServer(["b"]) as second:
        second.on_path("/v1/chat/completions/input_tokens", reply(200, {"input_tokens": 2}))
        async with LLMClient([first.api_base, second.api_base]) as client:
            count = await client.count_tokens([{"role": "user", "content": "Hi"}], model="b")
        assert (count.tokens, count.exact) == (2, True)


async def test_our_own_client_counts_through_the_gateway(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/chat/completions/input_tokens", reply(200, {"input_tokens": 7}))
    async with Gateway(scripted_server.api_base) as gateway, LLMClient(gateway.api_base, "test-model") as client:
        count = await client.count_tokens([{"role": "user", "content": "Hi"}])
    assert (count.tokens, count.exact) == (7, True)


async def test_a_server_that_cannot_count_says_so_itself(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    scripted_server.on_path("/tokenize", reply(404, {"error": "no such path here"}))
    async with Gateway(scripted_server.api_base) as gateway:
        status, _, answer = await fetch(http, gateway, "/tokenize", b'{"content": "x"}')
    assert (status, json.loads(answer)) == (404, {"error": "no such path here"})


async def test_a_count_does_not_show_that_the_model_is_loaded(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    scripted_server.on_path("/tokenize", reply(200, {"tokens": [1]}))
    async with Gateway(scripted_server.api_base, limits=Limits()) as gateway:

        async def state() -> str:
            """Returns the state of the model on the status page, once the servers have listed their models."""
            while not (models := (await fetch_json(http, gateway, "/status.json"))["models"]):
                await asyncio.sleep(0)
            [found] = [model["state"] for model in models if model["name"] == "test-model"]
            return str(found)

        await fetch(http, gateway, "/tokenize", b'{"model": "test-model", "content": "x"}')
        assert await state() == "cold"
        _, _, metrics = await fetch(http, gateway, "/metrics", method="GET")
        assert b'endpoint="/tokenize",model="test-model",outcome="200"} 1.0' in metrics
        await fetch(http, gateway, CHAT, BODY)
        assert await state() == "loaded"
