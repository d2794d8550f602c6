"""Clients whose `api_base` is changed while something is in flight."""

from __future__ import annotations

import asyncio

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMValidationError,
    ModelMismatchError,
    TaskCancelledError,
)
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, stall
from tests.support import MESSAGES, piece, read_text


async def test_several_tasks_may_find_several_old_servers_idle(scripted_server: ScriptedServer) -> None:
    async with ScriptedServer() as second, ScriptedServer() as third, LLMClient(scripted_server.api_base) as client:
        gate = asyncio.Event()
        asked = []
        for server, following in ((scripted_server, second), (second, third)):
            server.script(answer("x", gate=gate))
            asked.append(asyncio.create_task(client.chat_completion(MESSAGES)))
            await server.wait_until(lambda server=server: server.in_flight)  # type: ignore[misc]  # mypy infers no lambda with defaults
            client.api_base = following.api_base
        gate.set()
        await asyncio.gather(*asked)
        await asyncio.gather(*[client.chat_completion(MESSAGES) for _ in range(4)])


async def test_a_key_of_the_environment_stays_when_the_server_changes(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_API_TOKEN", "key-at-the-start")
    async with LLMClient("http://127.0.0.1:1") as client:
        monkeypatch.delenv("LM_API_TOKEN")
        client.api_base = scripted_server.api_base
        await client.chat_completion(MESSAGES)
    assert scripted_server.requests[0].headers["authorization"] == "Bearer key-at-the-start"


async def test_a_mismatch_has_the_body_of_the_reply(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("x", model="other")
    async with LLMClient(scripted_server.api_base, "m", model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.body is not None
    assert '"other"' in caught.value.body


@pytest.mark.parametrize("url", ["http://a..b", "http://..", f"http://{'a' * 70}.com"])
def test_a_host_that_cannot_exist_is_refused_when_the_client_is_made(url: str) -> None:
    with pytest.raises(LLMValidationError, match="is not a valid URL"):
        LLMClient(url)


async def test_the_connections_to_an_old_server_are_closed_once_it_is_idle(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.transport.session.KEEPALIVE_SECONDS", 60)  # so that they do not just run out
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base) as client:
        await client.chat_completion(MESSAGES)
        client.api_base = other.api_base
        await client.chat_completion(MESSAGES)
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_list_that_is_under_way_ends_on_the_old_server(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()

    async def held(exchange: Exchange) -> None:
        await gate.wait()
        await reply(200, {"data": [{"id": "old"}]})(exchange)

    scripted_server.on_path("/v1/models", held)
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base) as client:
        listing = asyncio.create_task(client.list_models())
        await scripted_server.wait_until(lambda: scripted_server.requests)
        client.api_base = other.api_base
        await client.chat_completion(MESSAGES)
        gate.set()
        assert await listing == ["old"]


async def test_limits_stay_when_the_server_changes(scripted_server: ScriptedServer) -> None:
    async with LLMClient("http://127.0.0.1:1", limits=Limits(max_concurrency=2)) as client:
        client.api_base = scripted_server.api_base
        await asyncio.gather(*[client.chat_completion(MESSAGES) for _ in range(8)])
    assert scripted_server.max_in_flight == 2


async def test_api_base_can_be_set_while_a_stream_ends_on_the_old_one(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("from the old one", gate=gate))
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base, api_key="key") as client:
        other.default = answer("from the other")
        stream = await client.chat_completion(MESSAGES, stream=True)
        client.api_base = other.origin
        assert client.api_base == other.api_base
        reply = await client.chat_completion(MESSAGES)
        assert reply["choices"][0]["message"]["content"] == "from the other"
        assert other.requests[0].headers["authorization"] == "Bearer key"
        gate.set()
        assert await read_text(stream) == "from the old one"
        await client.chat_completion(MESSAGES)
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_plain_request_ends_on_the_old_server_too(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("from the old one", gate=gate))
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base) as client:
        asked = asyncio.create_task(client.chat_completion(MESSAGES))
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        client.api_base = other.api_base
        await client.list_models()
        gate.set()
        assert (await asked)["choices"][0]["message"]["content"] == "from the old one"


async def test_closing_closes_old_servers_as_well(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    client = LLMClient(scripted_server.api_base)
    stream = await client.chat_completion(MESSAGES, stream=True)
    client.api_base = "http://127.0.0.1:1"
    await client.close()
    with pytest.raises(TaskCancelledError):
        await read_text(stream)


async def test_a_wrong_api_base_is_refused_and_changes_nothing(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    with pytest.raises(LLMValidationError):
        client.api_base = "nonsense"
    assert client.api_base == scripted_server.api_base
    assert await client.health_check()
