"""The models of the servers behind a gateway: the lists that clients get, and what the status page knows of them."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from lmbridge import Limits
from lmbridge.gateway import Gateway
from lmbridge.gateway.model_catalog import ModelCatalog
from lmbridge.testing import OneModelServer, ScriptedServer, raw, reply, reset
from lmbridge.transport import Transport
from tests.gateway.support import BODY, CHAT, fetch, fetch_json


async def test_models_are_those_of_the_server(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    body = b'{"object": "list",  "data": [{"id": "a/b", "x": 1}], "models": []}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Odd: 1\r\nContent-Length: %d\r\n\r\n" % len(body)
    scripted_server.on_path("/v1/models", raw(head, body))
    status, headers, received = await fetch(http, gateway, "/v1/models", method="GET")
    assert (status, headers["X-Odd"], received) == (200, "1", body)
    status, _, received = await fetch(http, gateway, "/v1/models/a/b", method="GET")
    assert (status, json.loads(received)) == (200, {"id": "a/b", "x": 1})
    status, _, received = await fetch(http, gateway, "/v1/models/c", method="GET")
    assert (status, json.loads(received)["error"]["code"]) == (404, "model_not_found")


async def test_a_list_of_models_is_never_compressed(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    await fetch(http, gateway, "/v1/models", method="GET")
    assert scripted_server.requests[-1].headers["Accept-Encoding"] == "identity"


async def test_a_refused_list_of_models_leaves_those_that_are_known(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    await fetch(http, gateway, "/v1/models", method="GET")
    scripted_server.on_path("/v1/models", reply(401, {"error": {"message": "no key"}}))
    status, _, _ = await fetch(http, gateway, "/v1/models", method="GET")
    assert status == 401
    assert (await fetch_json(http, gateway, "/status.json"))["models"]


async def test_the_status_lists_models_that_nobody_has_asked_for(http: aiohttp.ClientSession) -> None:
    async with (
        OneModelServer(["a", "b"]) as server,
        Gateway(server.api_base, limits=Limits(max_loaded_models=1)) as gateway,
    ):
        await fetch(http, gateway, CHAT, BODY.replace(b"test-model", b"a"))
        status = await fetch_json(http, gateway, "/status.json")
        while len(status["models"]) < 2:
            status = await fetch_json(http, gateway, "/status.json")
        assert {model["name"]: model["state"] for model in status["models"]} == {"a": "loaded", "b": "cold"}


MODELS = "/v1/models"
REFUSAL = reply(401, {"error": {"message": "no key"}})


@pytest.mark.parametrize("others", [0, 1])
async def test_a_server_is_healthy_if_it_answered_the_last_question_for_its_models_whatever_the_answer_was(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, others: int
) -> None:
    async with (
        OneModelServer(["b"]) as other,
        Gateway([scripted_server.api_base, *[other.api_base] * others], max_retries=0) as gateway,
    ):

        async def is_healthy() -> bool:
            # The status page asks the servers for their models as well, but only if the last time was ten seconds ago.
            gateway._catalog._listed_at = asyncio.get_running_loop().time()
            status = await fetch_json(http, gateway, "/status.json")
            return bool(status["servers"][0]["healthy"])

        scripted_server.on_path(MODELS, reset())
        await fetch(http, gateway, MODELS, method="GET")
        assert not await is_healthy()
        scripted_server.on_path(MODELS, REFUSAL)
        await fetch(http, gateway, MODELS, method="GET")
        assert await is_healthy()
        scripted_server.on_path(MODELS, raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"{}"))
        await fetch(http, gateway, MODELS, method="GET")
        assert not await is_healthy()
        scripted_server.on_path(MODELS, reply(200, {"data": []}))
        await fetch(http, gateway, MODELS, method="GET")
        assert await is_healthy()


async def test_a_catalog_that_is_closed_asks_no_more(scripted_server: ScriptedServer) -> None:
    async with Transport(scripted_server.api_base) as transport:
        catalog = ModelCatalog([transport], passes_credentials=False)
        await catalog.close()
        before = asyncio.all_tasks()
        # The gateway still answers its status page while it closes.
        catalog.refresh()
        assert asyncio.all_tasks() == before
