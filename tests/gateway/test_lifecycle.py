"""Opening, draining and closing a gateway, and the program that a terminal starts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from lmbridge import Limits, LLMError, LLMValidationError
from lmbridge.gateway import Gateway
from lmbridge.gateway.__main__ import main
from lmbridge.gateway.http_server import HttpServer, IncomingRequest
from lmbridge.testing import Exchange, MockTransport, ScriptedServer, answer, hang_up, reply, stall
from lmbridge.transport.node_pool import NodePool
from lmbridge.transport.transport import Transport
from tests.gateway.support import BODY, CHAT, STREAM, Client, fetch, fetch_json
from tests.support import HALF, cancel_at_each_step, turns


async def test_a_gateway_has_an_address_while_it_is_open(scripted_server: ScriptedServer) -> None:
    gateway = Gateway(scripted_server.api_base)
    with pytest.raises(LLMError, match="not open"):
        assert gateway.api_base
    async with gateway:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", gateway.api_base)
        assert gateway.origin in repr(gateway)
    await gateway.close()
    with pytest.raises(LLMError, match="only once"):
        await gateway.open()


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0"])
async def test_other_addresses(scripted_server: ScriptedServer, http: aiohttp.ClientSession, host: str) -> None:
    async with Gateway(scripted_server.api_base, host=host, api_key="x") as gateway:
        assert await fetch_json(http, gateway, "/health") == {"status": "ok"}


async def test_a_port_that_is_taken_is_an_error(scripted_server: ScriptedServer, gateway: Gateway) -> None:
    port = int(gateway.origin.rpartition(":")[2])
    other = Gateway(scripted_server.api_base, port=port)
    with pytest.raises(LLMError, match=f"cannot listen on 127.0.0.1:{port}"):
        await other.open()
    await other.close()


@pytest.mark.parametrize(
    "options",
    [
        {"upstreams": []},
        {"upstreams": 5},
        {"upstreams": [5]},
        {"upstreams": "no URL"},
        {"upstreams": ["http://127.0.0.1:1", "http://127.0.0.1:1"]},
        {"host": ""},
        {"port": -1},
        {"port": 65536},
        {"port": "80"},
        {"max_retries": -1},
        {"max_body_bytes": 0},
        {"client_timeout": 0},
        {"client_timeout": None},
        {"allowed_hosts": "a"},
        {"allowed_hosts": [1]},
        {"allowed_hosts": ["my-pc.lan:8080"]},
        {"allowed_hosts": ["http://my-pc.lan"]},
        {"allowed_hosts": ["*"]},
        {"api_key": ""},
        {"limits": "all"},
        {"timeout": -1},
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(LLMValidationError):
        Gateway(**options)


async def test_a_transport_is_used_as_it_is_and_stays_open(http: aiohttp.ClientSession) -> None:
    async with MockTransport(lambda _request: {"choices": [{"message": {"content": "Hello"}}]}) as transport:
        async with Gateway(transport) as gateway:
            status, _, body = await fetch(http, gateway)
            assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "Hello")
        assert transport.closing is not None
        assert not transport.closing.done()


async def test_opening_can_be_cancelled_at_every_step(scripted_server: ScriptedServer) -> None:
    gateways: list[Gateway] = []

    async def open_one() -> None:
        gateways.append(Gateway(scripted_server.api_base))
        async with gateways[-1]:
            pass

    async def nothing_is_left() -> None:
        await gateways[-1].close()

    await cancel_at_each_step(open_one, nothing_is_left, at_least=2)


async def test_the_limits_are_those_of_the_server(http: aiohttp.ClientSession) -> None:
    async with ScriptedServer() as server, Gateway(server.api_base) as gateway:
        server.on_path("/v1/models", reply(200, {"data": [{"id": "a", "owned_by": "llamacpp"}]}))
        server.on_path("/props", reply(200, {"total_slots": 3, "build_info": "b1"}))
        await fetch(http, gateway)
        [shown] = (await fetch_json(http, gateway, "/status.json"))["servers"]
        assert shown["limits"] == {"max_concurrency": 3, "max_loaded_models": None}


# The end


async def test_draining_refuses_new_requests_and_finishes_the_others(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    finish = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await finish.wait()
        await reply(200, {})(exchange)

    scripted_server.script(slow, reply(200, {}))
    async with Gateway(scripted_server.api_base, limits=Limits(max_concurrency=1)) as gateway:
        running = [asyncio.create_task(fetch(http, gateway)) for _ in range(2)]
        await scripted_server.wait_until(lambda: scripted_server.requests)
        while gateway.stats().queued == 0:
            await turns()
        draining = asyncio.create_task(gateway.drain())
        await turns()
        status, headers, body = await fetch(http, gateway)
        assert (status, headers["Retry-After"]) == (503, "5")
        assert json.loads(body)["error"]["code"] == "draining"
        status, _, body = await fetch(http, gateway, "/health", method="GET")
        assert (status, json.loads(body)) == (503, {"status": "draining"})
        assert (await fetch_json(http, gateway, "/status.json"))["draining"] is True
        assert not draining.done()
        finish.set()
        await draining
        assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200]


async def test_draining_waits_for_a_request_that_is_still_being_sent(scripted_server: ScriptedServer) -> None:
    async with Gateway(scripted_server.api_base, limits=Limits()) as gateway:
        client = await Client.connect(gateway)
        client.send(f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: {len(BODY)}\nExpect: 100-continue")
        # The gateway has accepted the request.
        assert await client.status() == 100
        await client.reader.readline()
        draining = asyncio.create_task(gateway.drain())
        await turns()
        assert not draining.done()
        client.writer.write(BODY)
        assert await client.status() == 200
        await draining


async def test_a_request_that_arrives_while_the_gateway_closes_leaves_nothing_open(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway(scripted_server.api_base, limits=Limits())
    await gateway.open()
    origin = gateway.origin
    await fetch(http, gateway)
    close = Transport.close
    asked: list[Transport] = []

    async def close_late(transport: Transport) -> None:
        await close(transport)
        if not asked:
            asked.append(transport)
            async with http.get(f"{origin}/v1/models") as response:
                assert response.status == 200

    monkeypatch.setattr(Transport, "close", close_late)
    await gateway.close()
    [transport] = asked
    assert transport._open_state is None


async def test_draining_an_idle_gateway_takes_no_time(gateway: Gateway) -> None:
    await gateway.drain()


async def test_closing_ends_what_is_in_flight_and_what_waits(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=HALF), stall())
    gateway = Gateway(scripted_server.api_base, limits=Limits(max_concurrency=2))
    await gateway.open()
    streaming, waiting, queued = [await Client.connect(gateway) for _ in range(3)]
    streaming.post(STREAM)
    await streaming.reader.readuntil(b"data:")
    waiting.post(BODY)
    await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
    queued.post(BODY)
    while gateway.stats().queued == 0:
        await turns()
    await gateway.close()
    assert b'"code": "closing"' in await streaming.rest()
    assert [await waiting.status(), await queued.status()] == [503, 503]
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 2)


async def test_a_request_that_waits_too_long_is_told_to_come_back(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    limits = Limits(max_concurrency=1, max_queue=0.05)
    scripted_server.script(stall(after=HALF))
    async with Gateway(scripted_server.api_base, limits=limits) as gateway:
        client = await Client.connect(gateway)
        client.post(STREAM)
        await client.reader.readuntil(b"data:")
        for body in (BODY, STREAM):
            status, headers, answered = await fetch(http, gateway, CHAT, body)
            error = json.loads(answered)["error"]
            assert (status, headers["Retry-After"], error["code"]) == (503, "5", "queue_timeout")
            assert "not admitted within 0.05 s" in error["message"]


# Several servers


async def test_several_servers_are_one(http: aiohttp.ClientSession) -> None:
    async with ScriptedServer(["a", "b"]) as first, ScriptedServer(["b", "c"]) as second:
        first.default, second.default = answer("first"), answer("second")
        async with Gateway([first.api_base, second.api_base], limits=Limits()) as gateway:
            models = await fetch_json(http, gateway, "/v1/models")
            assert [model["id"] for model in models["data"]] == ["a", "b", "c"]
            for model, text in [("a", b"first"), ("c", b"second")]:
                _, _, body = await fetch(http, gateway, CHAT, BODY.replace(b"test-model", model.encode()))
                assert text in body
            status = await fetch_json(http, gateway, "/status.json")
            assert [server["url"] for server in status["servers"]] == [first.api_base, second.api_base]
            assert all(server["healthy"] for server in status["servers"])


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
async def test_another_server_takes_over_before_the_first_byte(
    http: aiohttp.ClientSession, no_waits: list[float], body: bytes
) -> None:
    async with ScriptedServer() as first, ScriptedServer() as second:
        first.default = hang_up()
        second.default = answer("second")
        async with Gateway([first.api_base, second.api_base], limits=Limits()) as gateway:
            for _ in range(4):
                status, _, answered = await fetch(http, gateway, CHAT, body)
                assert (status, b"second" in answered) == (200, True)
            status_page = await fetch_json(http, gateway, "/status.json")
            assert [server["healthy"] for server in status_page["servers"]] == [False, True]


async def test_a_pool_is_used_as_it_is(http: aiohttp.ClientSession) -> None:
    async with (
        ScriptedServer() as server,
        NodePool([Transport(server.api_base)]) as pool,
        Gateway(pool) as gateway,
    ):
        status, _, _ = await fetch(http, gateway)
        assert status == 200


# The program


@asynccontextmanager
async def program(server: ScriptedServer, *options: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Starts the program, and provides its process and its URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "lmbridge.gateway", server.api_base, "--port", "0", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LMBRIDGE_GATEWAY_KEY": "from-the-environment"},
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        found = re.fullmatch(r"lmbridge gateway: (http://127\.0\.0\.1:\d+)/v1, status page: \1/status\n", line)
        assert found, line
        yield process, found[1]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_program_drains_on_a_signal(scripted_server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    finish = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await finish.wait()
        await reply(200, {"whole": True})(exchange)

    scripted_server.script(slow)
    async with program(scripted_server, "--max-concurrency", "1") as (process, origin):
        headers = {"Authorization": "Bearer from-the-environment"}
        async with http.post(origin + CHAT, data=BODY) as response:
            assert response.status == 401
        running = asyncio.create_task(http.post(origin + CHAT, data=BODY, headers=headers))
        await scripted_server.wait_until(lambda: scripted_server.requests)
        process.send_signal(signal.SIGTERM)
        status = 200
        while status == 200:
            async with http.get(f"{origin}/health") as response:
                status = response.status
        async with http.post(origin + CHAT, data=BODY, headers=headers) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "5")
        finish.set()
        async with await running as response:
            assert await response.json() == {"whole": True}
        assert await process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
async def test_a_second_signal_ends_the_program_at_once(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, number: signal.Signals
) -> None:
    scripted_server.script(stall())
    async with program(scripted_server, "--max-concurrency", "1") as (process, origin):
        headers = {"X-Api-Key": "from-the-environment"}
        running = asyncio.create_task(http.post(origin + CHAT, data=BODY, headers=headers))
        await scripted_server.wait_until(lambda: scripted_server.requests)
        process.send_signal(number)
        status = 200
        while status == 200:
            async with http.get(f"{origin}/health") as response:
                status = response.status
        process.send_signal(number)
        assert await process.wait() == 0
        async with await running as response:
            assert response.status == 503
    await scripted_server.wait_until(lambda: scripted_server.aborts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:1", "--host", "0.0.0.0"], "everybody on the network"),
        (["no URL"], "api_base"),
        (["http://127.0.0.1:1", "--max-concurrency", "0"], "max_concurrency"),
    ],
)
def test_mistakes_are_explained_in_a_line_and_status_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"lmbridge gateway: .*{message}", line)


# Clients that leave


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_client_that_leaves_while_it_is_written_to_is_no_error_in_the_log(
    has_begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    answered = asyncio.Event()

    async def answer(incoming: IncomingRequest) -> None:
        try:
            if has_begun:
                await incoming.begin(200, [])
            transport = incoming._request.transport
            assert transport is not None
            # It is closing from now on, and what is written raises aiohttp's `ClientConnectionResetError`.
            transport.close()
            await (incoming.write(b"late") if has_begun else incoming.begin(200, []))
        finally:
            answered.set()

    server = HttpServer(answer, client_seconds=5)
    port = await server.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
    await answered.wait()
    await reader.read()
    writer.close()
    await server.close()
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_an_unexpected_error_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> Gateway:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr("lmbridge.gateway.__main__.Gateway", fail)
    with pytest.raises(SystemExit, match=r"^1$"):
        main([])
    hint = "run it again with --debug for the traceback"
    assert capsys.readouterr().err == f"lmbridge gateway: unexpected ZeroDivisionError: a bug; {hint}\n"


def test_a_signal_after_the_end_of_the_program_changes_nothing() -> None:
    code = """
import asyncio, os, signal
from lmbridge.gateway import Gateway
from lmbridge.gateway.__main__ import serve

async def main():
    asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
    await serve(Gateway("http://127.0.0.1:9"))

asyncio.run(main())
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), number)
print("over")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines()[1:], done.stderr, done.returncode) == (["over"], "", 0)
