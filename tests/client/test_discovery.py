"""`discover`: finds the model servers among the programs that listen on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

import lmbridge
from lmbridge import FoundServer, LLMAuthenticationError, LLMTimeoutError, LLMValidationError, ServerInfo
from lmbridge.client import discovery
from lmbridge.testing import ScriptedServer, reply, stall
from tests.client.test_captures import CAPTURES
from tests.client.test_server_info import RECORDED, serve
from tests.support import cancel_at_each_step

LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
PATIENT = 10.0


def port_of(server: ScriptedServer) -> int:
    return int(server.origin.rpartition(":")[2])


async def discover(*servers: ScriptedServer) -> list[FoundServer]:
    return await lmbridge.discover([port_of(server) for server in servers], timeout=PATIENT)


@pytest_asyncio.fixture
async def servers() -> AsyncIterator[list[ScriptedServer]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedServer()) for _ in range(3)]


def test_the_ports_are_those_of_the_servers_that_lmbridge_knows() -> None:
    assert discovery.DEFAULT_PORTS == (1234, 9931, 8080, 11434, 8000)


async def test_servers_are_listed_in_the_order_of_their_ports_with_what_they_report(
    servers: list[ScriptedServer],
) -> None:
    one, other, _ = servers
    serve(one, models=CAPTURES["xllamacpp-smollm2/models"], props=RECORDED["llama_server_props"])
    found = await discover(other, one)
    assert [each.api_base for each in found] == [other.api_base, one.api_base]
    assert [each.info.kind for each in found] == ["unknown", "llama.cpp"]
    assert found[1].info.loaded_models == ("smollm2",)
    assert [each.error for each in found] == [None, None]


async def test_a_port_without_a_server_is_left_out(scripted_server: ScriptedServer) -> None:
    async with ScriptedServer() as closed:
        port = port_of(closed)
    assert [each.api_base for each in await lmbridge.discover([port, port_of(scripted_server)], timeout=PATIENT)] == [
        scripted_server.api_base
    ]


@pytest.mark.parametrize(
    "answer",
    [
        reply(404, "<h1>Not Found</h1>"),
        reply(200, "<html>It works!</html>"),
        reply(200, {"data": "none"}),
        reply(401, "Unauthorized"),
        reply(401, ["error"]),
        reply(503, "<h1>Service Unavailable</h1>"),
        reply(500, {"error": "no such table"}),
        reply(307, headers={"Location": "https://example.com/"}),
    ],
)
async def test_what_is_not_a_model_server_is_left_out(scripted_server: ScriptedServer, answer: Any) -> None:
    scripted_server.on_path("/v1/models", answer)
    assert await discover(scripted_server) == []


async def test_a_program_that_does_not_speak_http_is_left_out() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await lmbridge.discover([port], timeout=PATIENT) == []


async def test_a_server_that_does_not_answer_in_time_is_left_out(servers: list[ScriptedServer]) -> None:
    silent, silent_later, _ = servers
    silent.on_path("/v1/models", stall())
    silent_later.on_path("/api/v1/models", stall())
    ports = [port_of(silent), port_of(silent_later)]
    assert await lmbridge.discover(ports, timeout=0.05) == []
    await silent.wait_until(lambda: silent.open_connections == 0)


async def test_a_server_that_requires_a_key_is_listed_with_its_refusal(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_API_TOKEN", "secret-of-another-server")
    scripted_server.on_path("/v1/models", reply(401, {"error": {"message": "Invalid API Key"}}))
    (found,) = await discover(scripted_server)
    assert found.info == ServerInfo(kind="unknown")
    assert isinstance(found.error, LLMAuthenticationError)


async def test_no_key_is_sent_to_whatever_listens(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_API_TOKEN", "secret-of-another-server")
    assert len(await discover(scripted_server)) == 1
    assert scripted_server.requests
    assert all("Authorization" not in request.headers for request in scripted_server.requests)


async def test_a_server_that_is_loading_is_listed_without_waiting_for_it(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(503, LOADING))
    (found,) = await discover(scripted_server)
    assert found.info.kind == "unknown"
    assert isinstance(found.error, LLMTimeoutError)
    assert found.error.phase == "load"
    assert len(scripted_server.requests) == 2


async def test_a_port_that_is_named_twice_is_asked_once(scripted_server: ScriptedServer) -> None:
    assert len(await discover(scripted_server, scripted_server)) == 1


async def test_a_cancelled_search_leaves_no_connection_behind(scripted_server: ScriptedServer) -> None:
    async def search() -> None:
        assert await discovery._look(port_of(scripted_server), PATIENT)

    async def no_connection_is_open() -> None:
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)

    await cancel_at_each_step(search, no_connection_is_open, at_least=3)


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ([], r"ports is empty; for example ports=\[1234, 9931\]"),
        ([0], "ports must be an integer from 1 to 65535, not 0"),
        ([65536], "not 65536"),
        (["1234"], "not '1234'"),
        ("1234", "ports must be a list of integers from 1 to 65535, not '1234'"),
        (1234, "not 1234"),
    ],
)
async def test_wrong_ports_are_errors(ports: Any, message: str) -> None:
    with pytest.raises(LLMValidationError, match=message):
        await lmbridge.discover(ports)


@pytest.mark.parametrize("timeout", [0, -1, None, "1"])
async def test_a_wrong_timeout_is_an_error(timeout: Any) -> None:
    with pytest.raises(LLMValidationError, match="timeout must be a positive number of seconds"):
        await lmbridge.discover(timeout=timeout)
